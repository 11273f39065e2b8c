"""Forty workloads in the words of those who run them, and what an expert would choose for each.

Written before the rules and the vocabulary, from the decision lists that practitioners use. `text`
is a description, `again` the same needs in other words, `because` the facts an expert would name.
`flip` changes one fact of `text` (the first phrase becomes the second) and with it the answer.
"""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    text: str
    again: tuple[str, ...]
    boundary: str
    because: tuple[str, ...]
    flip: tuple[str, str]
    flipped: str


CASES = (
    Case(
        "multi-tenant hosting",
        "Shared web hosting. Each customer uploads their own PHP sites. Customers do not know "
        "each other and must not be able to reach each other.",
        (
            "We host PHP sites for many unrelated companies on the same servers; the tenants "
            "bring their own code.",
            "Mutually distrusting tenants run customer-supplied PHP on one box.",
        ),
        "microvm",
        ("trust=untrusted", "tenancy=strangers"),
        (
            "Each customer uploads their own PHP sites. Customers do not know each other and "
            "must not be able to reach each other.",
            "All PHP sites are ours, written by our own team.",
        ),
        "container",
    ),
    Case(
        "trusted CI",
        "CI jobs for our own repositories: builds and tests start hundreds of times a day, must "
        "come up within a second or two and leave nothing behind.",
        (
            "Build and test runners for code we write in-house; jobs are ephemeral and need a fast "
            "start.",
        ),
        "container",
        ("trust=own",),
        ("our own repositories", "pull requests from people we do not know"),
        "microvm",
    ),
    Case(
        "public CI",
        "A public CI service which executes build scripts from arbitrary pull requests. A job "
        "takes a few minutes and its environment is thrown away.",
        ("Anybody can open a PR and our runners execute it; every build is disposable.",),
        "microvm",
        ("trust=untrusted",),
        ("arbitrary pull requests", "branches that our own developers have reviewed"),
        "container",
    ),
    Case(
        "legacy ERP",
        "A legacy ERP system, certified for RHEL 6 only, that loads its own kernel module for the "
        "licence dongle.",
        (
            "Our old ERP needs a proprietary kernel driver and an ancient Red Hat release.",
            "ERP from 2010 which insists on its out-of-tree kernel modules.",
        ),
        "vm",
        ("modules=yes",),
        (
            "A legacy ERP system, certified for RHEL 6 only, that loads its own kernel module for "
            "the licence dongle.",
            "An ERP system that runs as an ordinary process and needs no kernel modules.",
        ),
        "container",
    ),
    Case(
        "PCI database",
        "PostgreSQL with cardholder data, in scope of PCI-DSS, on a host that other departments "
        "use too.",
        (
            "A database that stores credit card numbers and falls under PCI DSS; the server is "
            "shared between departments.",
        ),
        "vm",
        ("compliance=pci-dss", "state=database"),
        (
            "with cardholder data, in scope of PCI-DSS, on a host that other departments use too",
            "for a team of ours, out of scope of PCI-DSS",
        ),
        "container",
    ),
    Case(
        "AI agent",
        "We execute Python snippets that an AI agent generates. Each lives for a few seconds and "
        "has to start in a fraction of a second.",
        (
            "LLM-generated code is run in throw-away environments; cold start has to be below "
            "200 ms.",
            "Our assistant writes scripts and runs them at once. Nobody reviews that code.",
        ),
        "microvm",
        ("trust=untrusted",),
        ("that an AI agent generates", "that our own team writes and reviews"),
        "container",
    ),
    Case(
        "Windows server",
        "A .NET Framework application on Windows Server 2019 with IIS.",
        ("Line-of-business software that only runs on Microsoft Windows.",),
        "vm",
        ("os=windows",),
        (
            "A .NET Framework application on Windows Server 2019 with IIS",
            "A .NET 8 application in a Linux image",
        ),
        "container",
    ),
    Case(
        "VDI",
        "Virtual desktops for 50 office workers: each person gets a complete graphical desktop.",
        ("VDI for our call centre.", "Every employee needs a full remote desktop of their own."),
        "vm",
        ("desktop=yes",),
        (
            "Virtual desktops for 50 office workers: each person gets a complete graphical desktop",
            "A web application for 50 office workers: each person gets a web page",
        ),
        "container",
    ),
    Case(
        "serverless",
        "Serverless functions uploaded by customers. They are short-lived, scale to zero, and a "
        "cold start may take 150 ms.",
        (
            "A FaaS platform: tenants deploy functions which run for milliseconds and must start "
            "in about a tenth of a second.",
        ),
        "microvm",
        ("trust=untrusted", "start=instant"),
        ("uploaded by customers", "written by our own team"),
        "container",
    ),
    Case(
        "trading",
        "A latency-critical trading engine of our own: it needs dedicated cores, reserved memory "
        "and predictable microsecond response.",
        (
            "Low-latency order matching. Pinned CPUs and guaranteed memory are a must; jitter is "
            "not acceptable.",
        ),
        "vm",
        ("latency=low", "guarantee=reserved"),
        (
            "A latency-critical trading engine of our own: it needs dedicated cores, reserved "
            "memory and predictable microsecond response",
            "A trading report of our own: best effort is fine",
        ),
        "container",
    ),
    Case(
        "systemd monolith",
        "A monolith on Debian that expects systemd as process 1, with cron, sshd and rsyslog "
        "beside it.",
        ("One big application which brings its whole init system and a dozen of services.",),
        "vm",
        ("init=system",),
        (
            "that expects systemd as process 1, with cron, sshd and rsyslog beside it",
            "that is a single process and needs no init system",
        ),
        "container",
    ),
    Case(
        "microservices",
        "Forty microservices of our own teams, each deployed and scaled one by one from an image.",
        ("Our in-house microservice architecture; every service is stateless and is released "
         "independently.",),
        "container",
        ("trust=own",),
        ("of our own teams", "of different companies that do not trust each other"),
        "microvm",
    ),
    Case(
        "web front end",
        "nginx serving static files of ours. Stateless, read-only, scales with demand within "
        "seconds.",
        ("A stateless nginx front end under our control, replicas come and go in seconds.",),
        "container",
        ("state=none",),
        ("static files of ours", "with Lua plugins that customers upload"),
        "microvm",
    ),
    Case(
        "HIPAA service",
        "A service for patient records of several hospitals. HIPAA applies, and the auditor asks "
        "for hardware-level separation of the tenants.",
        (
            "We process protected health information for multiple clinics under HIPAA and must "
            "show that a hypervisor lies between them.",
        ),
        "microvm",
        ("compliance=hipaa",),
        (
            "A service for patient records of several hospitals. HIPAA applies, and the auditor "
            "asks for hardware-level separation of the tenants.",
            "A service for the lunch menu of one hospital. HIPAA does not apply.",
        ),
        "container",
    ),
    Case(
        "FedRAMP",
        "Web services for two federal agencies on the same host, FedRAMP Moderate.",
        ("A government tenant requires FedRAMP authorisation for this stateless API.",),
        "microvm",
        ("compliance=fedramp",),
        (
            "Web services for two federal agencies on the same host, FedRAMP Moderate",
            "Web services of ours without any compliance requirement",
        ),
        "container",
    ),
    Case(
        "notebooks",
        "JupyterHub for students: anyone can run arbitrary code in a notebook.",
        ("Interactive notebooks in which users execute whatever they like.",),
        "microvm",
        ("trust=untrusted",),
        (
            "for students: anyone can run arbitrary code in a notebook",
            "for our own analysts, whom we trust",
        ),
        "container",
    ),
    Case(
        "contest judge",
        "A judge for programming contests: participants submit C++ programs we cannot trust. They "
        "are CPU-bound and make hardly any system calls.",
        (
            "Untrusted number-crunching submissions; purely compute, next to no I/O.",
            "Strangers' code is executed. It only calculates, file access is minimal.",
        ),
        "sandbox",
        ("trust=untrusted", "work=compute"),
        (
            "They are CPU-bound and make hardly any system calls",
            "They are I/O-bound and make lots of system calls",
        ),
        "microvm",
    ),
    Case(
        "transcoding",
        "ffmpeg of ours converts videos that users upload; the work is CPU-bound.",
        ("Our transcoder parses untrusted input files. It is compute-intensive.",),
        "sandbox",
        ("trust=input", "work=compute"),
        ("that users upload", "from our own studio only"),
        "container",
    ),
    Case(
        "plugins",
        "Third-party plugins run beside each other. They only compute, and memory is so tight that "
        "density matters most.",
        ("Extensions by unknown authors; CPU-bound, as many per host as possible.",),
        "sandbox",
        ("trust=untrusted", "work=compute"),
        ("Third-party plugins", "Plugins of our own team"),
        "container",
    ),
    Case(
        "BSD appliance",
        "A FreeBSD firewall appliance.",
        ("pfSense for the branch office.",),
        "vm",
        ("os=other",),
        ("A FreeBSD firewall appliance", "A Linux reverse proxy"),
        "container",
    ),
    Case(
        "kernel development",
        "Tests of our own kernel modules on different kernel versions side by side.",
        ("We must boot several kernel versions and load modules that we are developing.",),
        "vm",
        ("modules=yes",),
        (
            "Tests of our own kernel modules on different kernel versions side by side",
            "Tests of our own user space tools on the host's kernel",
        ),
        "container",
    ),
    Case(
        "GPU passthrough",
        "Model inference on a GPU handed over by PCI passthrough (VFIO).",
        ("Our inference needs a whole graphics card passed through with vfio-pci.",),
        "vm",
        ("hardware=passthrough",),
        ("a GPU handed over by PCI passthrough (VFIO)", "a GPU shared as a device file"),
        "container",
    ),
    Case(
        "home automation",
        "Home Assistant with a Zigbee USB stick as a device file; we trust it.",
        ("Trusted home automation that needs access to /dev/ttyUSB0.",),
        "container",
        ("hardware=device",),
        (
            "with a Zigbee USB stick as a device file; we trust it",
            "on Home Assistant OS, delivered as a VM image",
        ),
        "vm",
    ),
    Case(
        "nightly batch",
        "A nightly ETL batch job of ours, stateless, best effort.",
        ("In-house batch processing that runs every night and keeps no state.",),
        "container",
        ("trust=own", "state=none"),
        ("of ours", "with transformations that strangers supply"),
        "microvm",
    ),
    Case(
        "development",
        "Development environments of our team: dev, test and production shall use one image.",
        ("The same image from laptop to production, for our own developers.",),
        "container",
        ("trust=own",),
        (
            "dev, test and production shall use one image",
            "everybody gets a complete Linux desktop",
        ),
        "vm",
    ),
    Case(
        "Oracle",
        "An Oracle database which must have guaranteed I/O bandwidth, reserved memory and cores of "
        "its own.",
        ("A mission-critical SQL database with dedicated CPUs and guaranteed IOPS.",),
        "vm",
        ("state=database", "guarantee=reserved"),
        (
            "which must have guaranteed I/O bandwidth, reserved memory and cores of its own",
            "for tests of our own, without guaranteed resources",
        ),
        "container",
    ),
    Case(
        "company blog",
        "WordPress for our own company blog, data in a volume.",
        ("Our blog: WordPress, uploads are kept on a mounted volume, one organisation.",),
        "container",
        ("trust=own",),
        ("for our own company blog", "for blogs of unrelated customers"),
        "microvm",
    ),
    Case(
        "image builds",
        "A build service that executes customers' Dockerfiles.",
        ("Users send us Dockerfiles, we build them: RUN lines are arbitrary code.",),
        "microvm",
        ("trust=untrusted",),
        ("customers' Dockerfiles", "Dockerfiles of our own team"),
        "container",
    ),
    Case(
        "an engine per tenant",
        "Every tenant gets a Docker daemon of its own and runs its containers there.",
        ("Docker-in-Docker for separate customers: each has its own container engine.",),
        "vm",
        ("engine=yes",),
        (
            "Every tenant gets a Docker daemon of its own and runs its containers there",
            "Our team runs its containers on the host's engine",
        ),
        "container",
    ),
    Case(
        "old driver",
        "Measurement software from 2009 that needs Linux 2.6.18 and a vendor's driver.",
        ("It only works with kernel 2.6 and a closed-source kernel driver.",),
        "vm",
        ("modules=yes", "kernel=own"),
        (
            "that needs Linux 2.6.18 and a vendor's driver",
            "that is known to run on any current Linux kernel",
        ),
        "container",
    ),
    Case(
        "node agent",
        "A monitoring agent of ours that has to see all processes of the host and uses the host's "
        "network.",
        ("Our node exporter needs the host's PID namespace and host networking.",),
        "container",
        ("host=reach",),
        (
            "that has to see all processes of the host and uses the host's network",
            "that runs untrusted checks which customers upload",
        ),
        "microvm",
    ),
    Case(
        "malware",
        "We detonate malware samples for Windows.",
        ("Automatic malware analysis on Windows guests.",),
        "vm",
        ("os=windows",),
        ("for Windows", "for Linux"),
        "microvm",
    ),
    Case(
        "game servers",
        "Game servers of our own, which scale out within seconds when players come.",
        ("Elastic fleet of in-house game servers: new instances needed in seconds.",),
        "container",
        ("trust=own", "start=seconds"),
        ("of our own", "with mods that players upload"),
        "microvm",
    ),
    Case(
        "playground",
        "An online playground: visitors type code and run it.",
        ("Students paste programs into a web page and we execute them.",),
        "microvm",
        ("trust=untrusted",),
        ("visitors type code and run it", "visitors read examples that we wrote ourselves"),
        "container",
    ),
    Case(
        "departments",
        "An internal platform: finance and HR share hosts, the code is in-house, but the "
        "departments must not reach each other.",
        ("In-house services of several departments on common servers, to be kept apart.",),
        "microvm",
        ("tenancy=departments",),
        (
            "finance and HR share hosts, the code is in-house, but the departments must not reach "
            "each other",
            "one department has the hosts to itself, the code is in-house",
        ),
        "container",
    ),
    Case(
        "vendor appliance",
        "A vendor delivers its mail gateway as an OVA.",
        ("A virtual appliance, shipped as a qcow2 disk.",),
        "vm",
        ("form=disk",),
        ("as an OVA", "as an OCI image"),
        "container",
    ),
    Case(
        "queue workers",
        "Queue workers, our code, autoscaled on queue length within seconds; density is the cost "
        "driver.",
        ("Many small in-house workers. They must scale up quickly and be packed densely.",),
        "container",
        ("trust=own", "density=dense"),
        ("our code", "code that tenants supply"),
        "microvm",
    ),
    Case(
        "machine control",
        "Hard real-time machine control that needs a PREEMPT_RT kernel and isolated CPUs.",
        ("A real-time controller: own RT kernel, cores of its own.",),
        "vm",
        ("kernel=own", "guarantee=reserved"),
        (
            "Hard real-time machine control that needs a PREEMPT_RT kernel and isolated CPUs",
            "A dashboard for machine control that runs on any kernel",
        ),
        "container",
    ),
    Case(
        "test databases",
        "Throw-away PostgreSQL instances for the integration tests of our own code.",
        ("Ephemeral databases for our test suite, gone after each run.",),
        "container",
        ("trust=own",),
        ("our own code", "code that strangers submit"),
        "microvm",
    ),
    Case(
        "scraping",
        "Headless Chrome visits arbitrary web sites for us.",
        ("A browser farm which renders untrusted web pages.",),
        "microvm",
        ("trust=input",),
        ("arbitrary web sites", "only our own web sites"),
        "container",
    ),
)  # fmt: skip

CONTRADICTIONS = (
    "A Windows service that must start in 50 ms and scale to zero.",
    "It needs its own kernel modules, but virtual machines are forbidden here.",
    "A node agent which needs the host's PID namespace and runs untrusted code of customers.",
    "HIPAA applies and virtualisation is not allowed.",
    "The code is untrusted. It is fully trusted.",
    "A FreeBSD guest with host networking.",
    "A stateless service that keeps its data in a database of its own inside.",
    "Reserved memory for each, and overcommitted as densely as possible.",
    "An application with its own init system, a desktop and kernel modules that has to be up in "
    "milliseconds.",
    "We wrote all the code ourselves; customers upload the code.",
)
"""Needs that no boundary meets together, or that deny each other."""

SAME = (
    ("The code is not trusted.", "We do not trust the code.", "Untrusted code.",
     "This code can't be trusted.", "We don't trust that code at all."),
    ("No kernel modules are needed.", "It needs no kernel modules.",
     "It does not need kernel modules.", "Kernel modules aren't needed.",
     "Works without kernel modules."),
    ("It is not regulated.", "No compliance requirements.", "Compliance is not an issue.",
     "Not subject to any regulation."),
    ("It does not run on Linux but on Windows.", "Runs on Windows.", "Windows, not Linux."),
    ("No state is kept.", "It is stateless.", "It keeps no state.", "It does not store anything."),
    ("A database.", "It is a database server.", "MySQL.", "It runs a SQL database."),
)  # fmt: skip
"""Sentences that say the same: the same facts come out of each row."""

OTHERS = (
    ("We let our users run their own scripts on our infrastructure", "microvm"),
    ("Multi-tenant SaaS where customers can install third-party extensions", "microvm"),
    ("Sandbox for code produced by ChatGPT", "microvm"),
    ("Untrusted user code, runs for 100ms, needs to boot in under 125 ms", "microvm"),
    ("Legacy application that depends on a custom kernel module", "vm"),
    ("SAP on an old SLES with proprietary drivers", "vm"),
    ("Windows desktop app", "vm"),
    ("Redis cache for our internal API", "container"),
    ("A stateless REST API written by our team, autoscaled with traffic", "container"),
    ("Kubernetes microservices in Go, developed in-house", "container"),
    ("PostgreSQL holding credit card numbers, PCI-DSS compliance required", "vm"),
    ("Patient data API, HIPAA", "microvm"),
    ("We need strong isolation between customers", "microvm"),
    ("Real-time audio processing with pinned cores and guaranteed memory", "vm"),
    ("Full Ubuntu desktop for remote employees", "vm"),
    ("GitHub Actions runners for open source pull requests from forks", "microvm"),
    ("Jenkins agents building our own code", "container"),
    ("An application that expects systemd and multiple daemons", "vm"),
    ("Docker compose stack for local development", "container"),
    ("Edge functions, cold starts under 50 ms, customer code", "microvm"),
    ("OpenBSD mail relay", "vm"),
    ("Needs /dev/kvm? no. Simple nginx reverse proxy", "container"),
    ("Machine learning training with a GPU passed through", "vm"),
    ("Students submit homework which is compiled and executed", "microvm"),
    ("Regulated banking workloads for several banks", "microvm"),
    ("Prometheus node exporter with host network and host pid", "container"),
    ("Code interpreter tool for an LLM agent", "microvm"),
    ("We run code written by strangers; it is purely CPU-bound with few syscalls", "sandbox"),
    ("Trusted batch jobs, thousands per host, density is everything", "container"),
    ("Multiple teams share the cluster and must be isolated from each other", "microvm"),
    ("no untrusted code, everything is written by us", "container"),
    ("The code isn't ours and we can't vouch for it", "microvm"),
    ("WASM plugins from partners", "microvm"),
    ("An image processing service for pictures uploaded by users", "microvm"),
    ("FreeNAS storage", "vm"),
    ("Ansible control node, internal only", "container"),
    ("Needs own kernel version 5.4", "vm"),
    ("Application must load eBPF programs into the host kernel", "container"),
    ("Jenkins build agents for internal projects, thrown away after each build", "container"),
    ("A SaaS in which clients write their own automation scripts", "microvm"),
    ("Point of sale database with card data, audited for PCI", "vm"),
    ("Electronic medical records service under HIPAA", "microvm"),
    ("SQL Server 2019 on Windows", "vm"),
    ("Citrix style remote desktops for contractors", "vm"),
    ("Lambda-like functions for third parties", "microvm"),
    ("High-frequency trading; every microsecond counts; CPU pinning required", "vm"),
    ("Old CentOS 5 accounting program that only works with its original kernel", "vm"),
    ("Go microservice from our platform team behind an API gateway, stateless", "container"),
    ("Agentic coding assistant executing shell commands that the model came up with", "microvm"),
    ("We evaluate user-defined formulas; pure computation", "sandbox"),
    ("A monolithic Java application that we maintain ourselves, single JVM", "container"),
    ("Needs systemd, dbus and several daemons", "vm"),
    ("WireGuard gateway maintained by us", "container"),
    ("Nightly report generator, in-house", "container"),
    ("Hosts a Kubernetes cluster for each customer", "vm"),
    ("PDF rendering of documents sent in by the public", "microvm"),
    ("No third-party code, no customers' data, only our website", "container"),
    ("Government workload, FedRAMP High", "microvm"),
    ("Unreviewed pull requests get built automatically", "microvm"),
    ("Software router that needs its own kernel modules", "vm"),
    ("Customer code must never share a kernel with other customers", "microvm"),
    ("GPU device file /dev/nvidia0 for our model server", "container"),
    ("Solaris 10 billing", "vm"),
    ("bursty stateless workers that scale in seconds, written by us", "container"),
    ("hard drive image vmdk from VMware", "vm"),
    ("The tenants do not trust one another", "microvm"),
    ("It is not untrusted, we wrote it", "container"),
    ("An online IDE in which anyone can compile and run programs", "microvm"),
    ("Shared cluster for a dozen start-ups that have nothing to do with each other", "microvm"),
    ("Internal wiki for our company", "container"),
    ("ETL written by our data team, runs for ten minutes every hour", "container"),
    ("Mainframe emulator on AIX", "vm"),
    ("Our fraud detection model, trusted, stateless, must scale out in seconds", "container"),
    ("Credit card vault in PostgreSQL, PCI DSS level 1", "vm"),
    ("Telemedicine backend with health records, HIPAA audit next month", "microvm"),
    ("User scripts in Lua, latency below 100 ms to start", "microvm"),
    ("Fortran simulation with guaranteed cores and reserved RAM for real-time control", "vm"),
    ("Active Directory domain controller", "vm"),
    ("nginx with our static pages", "container"),
    ("Untrusted WebAssembly modules, compute only", "sandbox"),
    ("Fuzzing arbitrary binaries", "microvm"),
    ("Workstations for designers with a full desktop and GPU passthrough", "vm"),
    ("Proprietary kernel driver for a fibre card", "vm"),
    ("Autoscaling API workers developed by our engineers", "container"),
    ("customers bring their own containers", "microvm"),
    (
        "each department has its own services on common servers and they may not see each other",
        "microvm",
    ),
    ("An application that has no special needs, written by us", "container"),
)
"""Phrases that no case was written for, and what they should give."""
