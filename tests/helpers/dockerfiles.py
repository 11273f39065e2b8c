"""Ten Dockerfiles as people write them, with their contexts and what their images say.

All begin with tests.helpers.building's image. Times and ids do not get into their layers, so equal
sources give equal layers when SOURCE_DATE_EPOCH is set.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.building import BASE


@dataclass(frozen=True)
class Project:
    """A context; `says` is in the output of `command` (or the image's own)."""

    name: str
    files: dict[str, str]
    says: tuple[str, ...]
    command: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    before: dict[str, str] = field(default_factory=dict)
    """An image that is built first, from these files, as NAME-before."""

    def write(self, folder: Path, files: dict[str, str] | None = None) -> Path:
        """Make the context; its folder."""
        for name, text in (files or self.files).items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.replace("@BASE@", BASE))
        return folder


PYTHON = Project(
    "python",
    {
        "Dockerfile": """\
# syntax=docker/dockerfile:1
FROM @BASE@ AS build
WORKDIR /src
COPY app/ app/
RUN python3 -c "import py_compile; \\
    [py_compile.compile(f'app/{n}.py', f'/out/app/{n}.pyc') for n in ('__init__', 'shop')]"
FROM @BASE@ AS test
COPY --from=build /src/app /src/app
RUN cd /src && python3 -c 'from app import shop; assert shop.total([1, 2]) == 3' && echo > /ok
FROM @BASE@
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/srv
WORKDIR /srv
COPY --from=build /out/app app
COPY --from=test /ok /tested
COPY main.py .
CMD ["python3", "main.py"]
""",
        "app/__init__.py": "",
        "app/shop.py": "def total(prices):\n    return sum(prices)\n",
        "main.py": "from app.shop import total\nprint('total', total([40, 2]))\n",
    },
    ("total 42",),
)

NODE = Project(
    "node",
    {
        "Dockerfile": """\
ARG NODE_ENV=production
FROM @BASE@ AS bundle
ARG NODE_ENV
WORKDIR /app
COPY package.json ./
RUN --mount=type=cache,target=/root/.npm node -p "require('./package.json').version" > version
COPY src ./src
RUN node -e "const fs = require('fs'); fs.writeFileSync('bundle.js', \\
    fs.readdirSync('src').sort().map(f => fs.readFileSync('src/' + f)).join(''))"
FROM @BASE@
ENV NODE_ENV=production
WORKDIR /app
COPY --from=bundle /app/bundle.js /app/version ./
HEALTHCHECK --interval=30s --timeout=3s CMD ["node", "-e", "0"]
ENTRYPOINT ["node"]
CMD ["bundle.js"]
""",
        "package.json": '{"name": "app", "version": "1.2.3"}\n',
        "src/a.js": "const name = 'node';\n",
        "src/b.js": "console.log(name, require('fs').readFileSync('version', 'utf8').trim());\n",
    },
    ("node 1.2.3",),
)

STATIC = Project(
    "static",
    {
        "Dockerfile": """\
FROM @BASE@ AS build
WORKDIR /src
COPY Makefile *.c ./
RUN make CFLAGS=-O2 hello
FROM scratch
COPY --from=build /src/hello /hello
LABEL org.opencontainers.image.title="hello from scratch"
ENTRYPOINT ["/hello"]
CMD ["world"]
""",
        "Makefile": "hello: main.c\n\t$(CC) $(CFLAGS) -static -s -o $@ $<\n",
        "main.c": (
            "#include <stdio.h>\n"
            'int main(int c, char **v) { printf("hello, %s (%d)\\n", v[1], c); return 0; }\n'
        ),
    },
    ("hello, world (2)",),
)

SITE = Project(
    "site",
    {
        "Dockerfile": """\
FROM @BASE@
COPY --chmod=644 nginx.conf /etc/nginx/sites-available/default
COPY site/ /var/www/html/
EXPOSE 80
STOPSIGNAL SIGQUIT
VOLUME /var/cache/nginx
CMD ["nginx", "-g", "daemon off;"]
""",
        "nginx.conf": (
            "server {\n  listen 80;\n  root /var/www/html;\n  location / { index index.html; }\n}\n"
        ),
        "site/index.html": "<h1>it is served</h1>\n",
        "site/css/style.css": "h1 { color: green }\n",
    },
    ("it is served",),
    (
        "sh", "-c",
        "nginx && node -e \"require('http').get('http://127.0.0.1/', "
        'r => r.pipe(process.stdout))"',
    ),
)  # fmt: skip

HEREDOCS = Project(
    "heredocs",
    {
        "Dockerfile": """\
# escape=\\
FROM @BASE@
ARG WHO=you
RUN <<EOT
  set -e
  mkdir -p /opt/made
  echo "one for $WHO" > /opt/made/one
EOT
RUN <<EOT python3 -
print('two')
open('/opt/made/two', 'w').write('two\\n')
EOT
RUN <<SCRIPT
#!/usr/bin/env python3
open('/opt/made/three', 'w').write('three\\n')
SCRIPT
COPY <<EOF <<-"RAW" /etc/app/
who=$WHO
EOF
\traw=$WHO
\tRAW
RUN cat <<A > /opt/made/four && cat <<B >> /opt/made/four
four
A
five
B
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN cat /opt/made/* | sort > /opt/all; [[ -s /opt/all ]]
CMD cat /opt/all /etc/app/*
""",
    },
    ("one for you", "two", "three", "four", "five", "who=you", "raw=$WHO"),
)

MOUNTS = Project(
    "mounts",
    {
        "Dockerfile": """\
FROM @BASE@ AS tools
RUN printf '#!/bin/sh\\nexec sha256sum' > /bin/tool && chmod 755 /bin/tool
FROM @BASE@
RUN --mount=type=cache,id=made,target=/cache,sharing=locked \\
    test -e /cache/n || echo first > /cache/n; cat /cache/n > /from-cache
RUN --mount=type=secret,id=token --mount=type=secret,id=token,env=TOKEN \\
    --mount=type=tmpfs,target=/scratch \\
    test "$(cat /run/secrets/token)" = "$TOKEN" && cp /run/secrets/token /scratch && \\
    tr a-z n-za-m < /run/secrets/token > /rotated
RUN --mount=type=bind,target=/context --mount=type=bind,from=tools,source=/bin/tool,target=/tool \\
    --network=none /tool < /context/data.txt > /sum
CMD cat /from-cache /rotated /sum; ls -a /context /cache /scratch /run/secrets /tool 2>&1; true
""",
        "data.txt": "data\n",
        "token.txt": "unguessable token",
    },
    ("first", "hathrffnoyr gbxra",
     "6667b2d1aab6a00caa5aee5af8ad9f1465e567abf1c209d15727d57b3e8f6e5f",
     "cannot access '/context'", "cannot access '/cache'", "cannot access '/scratch'",
     "cannot access '/tool'"),
    options=("--secret", "id=token,src=token.txt"),
)  # fmt: skip

ONBUILD = Project(
    "onbuild",
    {
        "Dockerfile": (
            "FROM onbuild-before\nRUN cat /usr/src/built > /both && echo child >> /both\n"
        ),
        "source.txt": "from the child\n",
    },
    ("built: from the child", "child"),
    ("cat", "/both"),
    before={
        "Dockerfile": """\
FROM @BASE@
WORKDIR /usr/src
ONBUILD ARG PREFIX=built
ONBUILD COPY source.txt .
ONBUILD RUN echo "$PREFIX: $(cat source.txt)" > built
""",
    },
)

MATRIX = Project(
    "matrix",
    {
        "Dockerfile": """\
ARG VARIANT=full
ARG SUFFIX=${VARIANT}-1
FROM @BASE@ AS base-full
ENV KIND=full
FROM @BASE@ AS base-slim
ENV KIND=slim
FROM base-${VARIANT} AS chosen
ARG SUFFIX
ARG FEATURES="a b"
ARG TARGETARCH TARGETOS
ENV FEATURE_LIST="${FEATURES// /,}" NAME=${KIND:-none}-${SUFFIX##*-} \\
    EXTRA=${UNSET:+never}${UNSET:-default}
RUN echo "$KIND $SUFFIX $FEATURES $TARGETOS ${NAME} $FEATURE_LIST $EXTRA" > /matrix
LABEL variant=$KIND "quoted key"="quoted value"
FROM chosen AS unused
RUN exit 7
FROM chosen AS final
CMD cat /matrix
""",
    },
    ("slim slim-1 x y linux slim-1 x,y default",),
    options=("--build-arg", "VARIANT=slim", "--build-arg", "FEATURES=x y", "--target", "final"),
)

COPIES = Project(
    "copies",
    {
        "Dockerfile": """\
FROM @BASE@ AS src
WORKDIR /work
COPY --parents packages/*/package.json ./
COPY --parents ./packages/./two/lib /pivot/
COPY --exclude=*.md --exclude=**/test docs /docs/
ADD --chown=7:8 archive.tar /unpacked/
FROM @BASE@
COPY --link --from=src /work /work
COPY --from=src /pivot /pivot
COPY --from=src /docs /docs/
COPY --from=src /unpacked/ /unpacked/
COPY . /everything/
CMD cd / && find work pivot docs unpacked everything -type f | sort && stat -c %u:%g /unpacked/*
""",
        ".dockerignore": "**/node_modules\n*.log\n!keep.log\narchive.tar.gz\n",
        "packages/one/package.json": "1", "packages/one/index.js": "",
        "packages/two/package.json": "2", "packages/two/lib/x.js": "x",
        "packages/two/node_modules/dep/index.js": "never",
        "docs/a.txt": "a", "docs/README.md": "no", "docs/sub/test/t": "no", "docs/sub/b.txt": "b",
        "debug.log": "never", "keep.log": "kept",
    },
    ("work/packages/one/package.json\nwork/packages/two/package.json\n", "pivot/two/lib/x.js",
     "docs/a.txt\ndocs/sub/b.txt\n", "unpacked/inside.txt", "7:8", "everything/keep.log\n"),
)  # fmt: skip

USERS = Project(
    "users",
    {
        "Dockerfile": """\
FROM @BASE@
RUN groupadd --gid 1500 app && useradd --uid 1500 --gid app --create-home --shell /bin/bash app
WORKDIR /home/app/data
COPY --chown=app:app --chmod=u=rwX,go= secret.txt open.txt ./
COPY --chown=app run.sh /usr/local/bin/run
RUN chmod 755 /usr/local/bin/run && chown app . && rm /etc/motd; ln -s data ../link
USER app
RUN id -un > whoami && test ! -w /etc/passwd && umask 077 && echo mine > private
ENV HOME=/home/app
HEALTHCHECK NONE
ENTRYPOINT ["/usr/local/bin/run"]
""",
        "run.sh": "#!/bin/sh\nid -un; cat whoami; stat -c '%a %U:%G' secret.txt private; pwd\n",
        "secret.txt": "s\n", "open.txt": "o\n",
    },
    ("app\napp\n600 app:app\n600 app:app\n/home/app/data\n",),
)  # fmt: skip

PROJECTS = (PYTHON, NODE, STATIC, SITE, HEREDOCS, MOUNTS, ONBUILD, MATRIX, COPIES, USERS)
