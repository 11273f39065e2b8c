"""A folder as people have them: five Compose files, two manifests, and a libvirt domain."""

from pathlib import Path

FILES = {
    "blog.yaml": """\
services:
  web:
    image: busybox:latest
    command: [sh, -c, "mkdir -p /www && echo blog > /www/index.html && httpd -f -p 80 -h /www"]
    environment:
      STAGE: ${STAGE:-production}
    healthcheck:
      test: wget -q -O - http://127.0.0.1/
      interval: 1s
    deploy:
      resources:
        limits:
          memory: 32M
    labels:
      bulkhead.tenant: marketing
""",
    "shop.yaml": """\
services:
  front:
    image: busybox:latest
    command: sh -c 'while true; do nc -l -p 8080 -e hostname; done'
    depends_on: [cache]
    deploy:
      replicas: 2
    mem_limit: 24m
  cache:
    image: busybox:latest
    command: sleep 100000
    tmpfs: /cache
    mem_limit: 24m
  orders:
    image: postgres:16
    volumes: [orders:/var/lib/postgresql/data]
    mem_limit: 512m
    x-bulkhead:
      needs: Card holder data, PCI-DSS applies.
volumes:
  orders:
""",
    "agents.yaml": """\
services:
  runner:
    image: registry.example/agents/runner:3
    x-bulkhead:
      needs: It runs code that a language model wrote. Nobody reviews the code.
    mem_limit: 128m
  judge:
    image: registry.example/agents/judge:3
    x-bulkhead:
      needs: Strangers submit programs. CPU-bound, hardly any system calls.
    mem_limit: 64m
""",
    "ops.yaml": """\
services:
  watcher:
    image: registry.example/ops/watcher:1
    network_mode: host
    pid: host
    volumes: ["/var/run/docker.sock:/var/run/docker.sock", "/proc:/host/proc:ro"]
  builder:
    build: ./builder
    privileged: true
""",
    "wiki.yaml": """\
services:
  wiki:
    image: registry.example/wiki:2
    volumes: [pages:/pages]
    ports: ["8090:80"]
volumes:
  pages:
""",
    "payroll.yaml": """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: payroll
  namespace: hr
  annotations:
    bulkhead.needs: Departments must be kept apart.
spec:
  replicas: 2
  selector: {matchLabels: {app: payroll}}
  template:
    metadata:
      labels: {app: payroll}
    spec:
      containers:
        - name: api
          image: registry.example/hr/payroll:4
          resources: {limits: {memory: 128Mi, cpu: 250m}}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: leave
  namespace: hr
  annotations:
    bulkhead.needs: Departments must be kept apart.
spec:
  template:
    spec:
      containers:
        - name: api
          image: registry.example/hr/leave:4
          resources: {limits: {memory: 64Mi}}
""",
    "report.yml": """\
apiVersion: batch/v1
kind: CronJob
metadata:
  name: report
  namespace: finance
spec:
  schedule: "0 3 * * *"
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: Never
          containers:
            - name: report
              image: registry.example/finance/report:9
              envFrom:
                - secretRef: {name: ledger}
""",
    "erp.xml": """\
<domain type='kvm'>
  <name>erp</name>
  <description>Legacy ERP with its own kernel module.</description>
  <memory unit='GiB'>8</memory>
  <vcpu>4</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <source file='/var/lib/libvirt/images/erp.qcow2'/><target dev='vda'/>
    </disk>
    <interface type='network'><source network='default'/></interface>
  </devices>
</domain>
""",
    "README.md": "Not a part of it.\n",
}


def write(folder: Path) -> Path:
    """Write the folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder
