"""The metrics, in the order in which reports show them."""

from bulkhead.comparing.model import Metric

METRICS = (
    Metric(
        "start.first", "start", "start to first instruction", "ms",
        "From the command's spawn to the first byte that the workload writes, as its user sees it: "
        "client, engine, set-up, kernel where there is one, and the way back.",
    ),
    Metric(
        "start.exit", "start", "run to the end", "ms",
        "The same command until it has returned: with the removal of all that was made.",
    ),
    Metric(
        "start.cold", "start", "first instruction, cold", "ms",
        "Start to first instruction after the host's page cache was dropped.",
    ),
    Metric(
        "start.ready", "start", "start to ready", "ms",
        "From the command's spawn until a server in the workload answers a byte over the network.",
    ),
    Metric(
        "command.first", "command", "your command: first output", "ms",
        "From spawn to the first byte that the given command writes.",
    ),
    Metric(
        "command.exit", "command", "your command: whole run", "ms",
        "From spawn to the end of the given command.",
    ),
    Metric(
        "stop", "start", "stop", "ms",
        "From the stop command to its end; the workload ends at once at SIGTERM.",
    ),
    Metric(
        "exec", "start", "exec", "ms",
        "One more process in a running workload, from the command's spawn to its end.",
    ),
    Metric(
        "churn", "start", "starts per second", "1/s",
        "Runs to the end per second, two clients at once.", better="more",
    ),
    Metric(
        "memory", "memory", "memory of one more", "MiB",
        "How much the whole machine's memory in use grows with each further idle instance, caches "
        "dropped: the workload, its keeper's share, monitor, VMM, guest kernel, page tables, slab. "
        "A slope over several counts, not the sum of what processes say of themselves.",
    ),
    Metric(
        "density", "memory", "fit into the free memory", "",
        "Free memory of this host divided by the memory of one more; the note says at which count "
        "it was checked, and what was found there. CPU, ports and the like bound it as well.",
        better="more",
    ),
    Metric(
        "answer.alone", "memory", "answer, one instance", "ms",
        "An exec in one instance while no other runs.",
    ),
    Metric(
        "answer.full", "memory", "answer, among the checked count", "ms",
        "The same exec while as many others idle as `density` was checked with.",
    ),
    Metric(
        "image.disk", "image", "image on disk", "MiB",
        "What the image takes on this host's disk, layers and what is made of them.",
    ),
    Metric(
        "image.wire", "image", "image on the wire", "MiB",
        "Its layers as gzip makes them (level 6), which is how a registry is sent them.",
    ),
    *(
        Metric(f"call.{key}", "calls", title, "ns", explains)
        for key, title, explains in (
            ("getppid", "getppid", "The cheapest call: what entering the kernel costs here."),
            ("open", "open and close", "Two calls that look up a path."),
            ("stat", "stat", "A path looked up."),
            ("pipe", "write and read a pipe", "Two calls that move a byte."),
            ("fault", "map, touch, unmap a page", "Memory management: with one page fault."),
            ("fork", "fork, exit, wait", "A process made and ended."),
            ("switch", "switch to a process and back", "Two processes and two pipes."),
        )
    ),
    Metric(
        "cpu", "work", "arithmetic", "ms",
        "A fixed loop of multiplications and additions that makes no call.",
    ),
    Metric(
        "copy", "work", "memory bandwidth", "MB/s", "Copies of 16 MiB, the fastest of twelve.",
        better="more",
    ),
    Metric(
        "disk.write", "work", "disk, write", "MB/s",
        "64 MiB written into the workload's own root, with fsync.", better="more",
    ),
    Metric(
        "disk.read", "work", "disk, read back", "MB/s",
        "The same read again; in part from caches, as for any program.", better="more",
    ),
    Metric("disk.fsync", "work", "disk, small durable write", "µs", "4 KiB with fdatasync."),
    Metric(
        "net.trip", "network", "network, round trip", "µs",
        "A byte from the host to the workload's own address and back.",
    ),
    Metric(
        "net.in", "network", "network, into it", "MB/s", "A stream from the host.", better="more",
    ),
    Metric(
        "net.out", "network", "network, out of it", "MB/s", "A stream to the host.", better="more",
    ),
    Metric(
        "noise.cpu", "noise", "slowed by a busy neighbour", "x",
        "How much longer equal pieces of work take at the 99th percentile while a neighbour of the "
        "same kind, without limits, uses twice as many processes as there are CPUs.",
    ),
    Metric(
        "noise.disk", "noise", "durable write beside a busy neighbour", "x",
        "How much longer a small durable write takes while such a neighbour writes all the time.",
    ),
    Metric(
        "surface.filter", "surface", "host calls let through", "",
        "How many of the host kernel's system calls the outermost filter lets through, always or "
        "for some arguments: read from the kernel for every thread of the instance, united. No "
        "filter: all of them. It counts calls, not what can be done with them.",
    ),
    Metric(
        "surface.seen", "surface", "host calls seen", "",
        "How many different system calls the instance's processes made on the host's kernel while "
        "it served, transferred and ran a further process (tracepoint raw_syscalls:sys_enter).",
    ),
)  # fmt: skip

GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS))
