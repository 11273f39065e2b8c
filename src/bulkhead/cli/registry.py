"""Every command's words, the module that holds it, and its summary: all that start-up needs.

A module of `cli/commands/` exports `COMMANDS: dict[str, Command]` keyed by the first of its words.
"""

# words → (module, summary). Listed in the order of `bulkhead --help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Create and run a new container from an image"),
    "exec": ("exec", "Execute a command in a running container"),
    "ps": ("ps", "List containers"),
    "pull": ("transfer", "Download an image from a registry"),
    "push": ("transfer", "Upload an image to a registry"),
    "images": ("images", "List images"),
    "login": ("login", "Authenticate to a registry"),
    "logout": ("login", "Log out from a registry"),
    "search": ("login", "Search for images (not supported)"),
    "version": ("version", "Show the bulkhead version information"),
    "info": ("version", "Display system-wide information"),
    "attach": ("exec", "Attach local standard streams to a running container"),
    "commit": ("archives", "Create a new image from a container's changes"),
    "cp": ("cp", "Copy files/folders between a container and the local filesystem"),
    "create": ("run", "Create a new container"),
    "diff": ("show", "Inspect changes to files or directories on a container's filesystem"),
    "events": ("events", "Get real time events from the engine"),
    "explain": ("show", "Show the kernel's view of a container"),
    "export": ("archives", "Export a container's filesystem as a tar archive"),
    "history": ("images", "Show the history of an image"),
    "import": ("archives", "Import the contents from a tarball to create a filesystem image"),
    "inspect": ("inspect", "Return low-level information on bulkhead objects"),
    "kill": ("lifecycle", "Kill one or more running containers"),
    "load": ("archives", "Load an image from a tar archive or STDIN"),
    "logs": ("logs", "Fetch the logs of a container"),
    "pause": ("lifecycle", "Pause all processes within one or more containers"),
    "port": ("show", "List port mappings or a specific mapping for the container"),
    "rename": ("lifecycle", "Rename a container"),
    "restart": ("lifecycle", "Restart one or more containers"),
    "rm": ("lifecycle", "Remove one or more containers"),
    "rmi": ("images", "Remove one or more images"),
    "save": (
        "archives",
        "Save one or more images to a tar archive (streamed to STDOUT by default)",
    ),
    "start": ("start", "Start one or more stopped containers"),
    "stats": ("stats", "Display a live stream of container(s) resource usage statistics"),
    "stop": ("lifecycle", "Stop one or more running containers"),
    "tag": ("images", "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE"),
    "top": ("show", "Display the running processes of a container"),
    "unpause": ("lifecycle", "Unpause all processes within one or more containers"),
    "update": ("update", "Update configuration of one or more containers"),
    "wait": ("lifecycle", "Block until one or more containers stop, then print their exit codes"),
    "doctor": ("system", "Check what this host offers, and how to mend what it lacks"),
    "serve": ("system", "Run the engine in the foreground"),
    "completion": ("completion", "Print the completion script for bash, zsh or fish"),
    "container prune": ("lifecycle", "Remove all stopped containers"),
    "image bootstrap": ("transfer", "Make a minimal image from a distribution's packages"),
    "image prune": ("images", "Remove unused images"),
    "kernel add": ("kernel", "Add a guest kernel from a file"),
    "kernel ls": ("kernel", "List guest kernels"),
    "kernel pull": ("kernel", "Fetch a guest kernel from the distribution"),
    "kernel rm": ("kernel", "Remove one or more guest kernels"),
    "network connect": ("network", "Connect a container to a network"),
    "network create": ("network", "Create a network"),
    "network disconnect": ("network", "Disconnect a container from a network"),
    "network inspect": ("network", "Display detailed information on one or more networks"),
    "network ls": ("network", "List networks"),
    "network prune": ("network", "Remove all unused networks"),
    "network rm": ("network", "Remove one or more networks"),
    "vm create": ("vm", "Create a machine with disks of its own"),
    "vm ls": ("vm", "List machines"),
    "vm inspect": ("vm", "Display detailed information on one or more machines"),
    "vm images": ("vm", "List disk images"),
    "vm rmi": ("vm", "Remove one or more disk images"),
    "vm import": ("vm", "Make a disk image from a file"),
    "vm export": ("vm", "Write a machine's first disk as a file"),
    "vm bootstrap": ("vm", "Make a bootable disk image from a distribution's packages"),
    "vm snapshot": ("vm", "Save a machine, go back, or list what was saved"),
    "vm resize": ("vm", "Make a machine's disk larger"),
    "vm update": ("vm", "Change the hardware of a machine that does not run"),
    "vm autostart": ("vm", "Start a machine whenever the engine begins, or not"),
    "vm reset": ("vm", "Press the reset button of one or more machines"),
    "vm firmware": ("vm", "Fetch the UEFI firmware from the distribution, if there is none"),
    "vm screen": ("vm", "Show where a machine's screen is (VNC)"),
    "volume create": ("volume", "Create a volume"),
    "volume inspect": ("volume", "Display detailed information on one or more volumes"),
    "volume ls": ("volume", "List volumes"),
    "volume prune": ("volume", "Remove unused local volumes"),
    "volume rm": ("volume", "Remove one or more volumes"),
    "system df": ("df", "Show disk usage"),
    "system prune": ("system", "Remove unused data"),
    "system reservations": ("reservations", "Show what is reserved, and what is free"),
    "system shutdown": ("system", "Stop the engine and all that belongs to it"),
}

# Other words for the same command.
ALIASES: dict[str, str] = {
    **{
        f"container {word}": word
        for word in (
            "attach", "commit", "cp", "create", "diff", "exec", "export", "inspect", "kill", "logs",
            "pause", "port", "rename", "restart", "rm", "run", "start", "stats", "stop", "top",
            "unpause", "update", "wait", "explain",
        )
    },
    **{
        f"image {word}": word
        for word in ("history", "import", "load", "pull", "push", "save", "tag")
    },
    **{
        f"vm {word}": word
        for word in ("kill", "logs", "pause", "port", "rename", "restart", "rm", "start", "stats",
                     "stop", "unpause", "wait")
    },
    "vm console": "attach",
    "vm list": "vm ls",
    "container ls": "ps",
    "container list": "ps",
    "container ps": "ps",
    "container remove": "rm",
    "image ls": "images",
    "image list": "images",
    "image rm": "rmi",
    "image remove": "rmi",
    "image inspect": "inspect",
    "kernel list": "kernel ls",
    "kernel remove": "kernel rm",
    "network list": "network ls",
    "network remove": "network rm",
    "volume list": "volume ls",
    "volume remove": "volume rm",
    "system events": "events",
    "system info": "info",
}  # fmt: skip

# `inspect` looks at one type only when asked so.
IMPLIED: dict[str, tuple[str, ...]] = {
    "container inspect": ("--type=container",),
    "image inspect": ("--type=image",),
}

GROUPS: dict[str, str] = {
    "container": "Manage containers",
    "image": "Manage images",
    "kernel": "Manage guest kernels",
    "network": "Manage networks",
    "system": "Manage bulkhead",
    "vm": "Manage machines with disks of their own",
    "volume": "Manage volumes",
}
