# The Debian guest's one service of ours: runs the job, sends results back.
# Disks: vdb Python packages, vdc checkout and job.sh (both read-only), vdd takes a tar of results.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mkdir -p /run/exchange
cd /run/host/checkout && export PYTHONPATH=/run/host/checkout/src:/run/site
. /run/host/job.sh
tar cf /dev/vdd -C /run/exchange .
sync
