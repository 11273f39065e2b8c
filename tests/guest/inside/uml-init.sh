# The first process of the user-mode-linux guest: prepares what a test expects, runs the job, ends.
# Usage: sh uml-init.sh REPOSITORY EXCHANGE (folders of the host; EXCHANGE holds job.sh)
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
repository=$1 exchange=$2
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for folder in /dev/shm /run /mnt; do mount -t tmpfs tmpfs $folder; done
mkdir -p /mnt/exchange /mnt/repository
mount -t hostfs none /mnt/exchange -o "$exchange"
mount -t hostfs none /mnt/repository -o "$repository"
# The checkout may lie below one of these. They are on a disk: this kernel's tmpfs has no attributes.
mknod /run/disk b 98 0
mkdir /run/scratch
mount -t ext4 /run/disk /run/scratch
for folder in /tmp /var/tmp /var/lib; do
    mkdir -p /run/scratch$folder
    chmod 1777 /run/scratch$folder
    mount --bind /run/scratch$folder $folder
done
# modules.dep lists all that a module needs, what is needed first last.
load() {
    for path in $(sed -n "s,^\(\S*/$1\.ko\): *\(.*\),\1 \2,p" modules.dep | tr ' ' '\n' | tac); do
        busybox insmod "$path" 2>/dev/null
    done
}
cd "/usr/lib/uml/modules/$(uname -r)" 2>/dev/null && for name in overlay erofs bridge veth; do
    load $name
done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
echo 4 >/proc/sys/kernel/printk
mkdir -p "$repository" 2>/dev/null
[ -e "$repository/pyproject.toml" ] || mount --bind /mnt/repository "$repository"
mount -o remount,ro,bind /mnt/repository 2>/dev/null
cd "$repository" && PYTHONPATH="$repository/src" && export PYTHONPATH && . /mnt/exchange/job.sh
sync
echo o >/proc/sysrq-trigger
sleep 30
