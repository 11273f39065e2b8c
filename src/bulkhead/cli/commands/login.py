"""`login`, `logout` and `search`."""

import base64
import json
import os
import sys
from typing import Any

from bulkhead.cli import credentials
from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import Option, Parsed, UsageError
from bulkhead.errors import Invalid, NotFound, Unsupported


def _ask(parsed: Parsed) -> tuple[str, str]:
    user, password = parsed["username"], parsed["password"]
    if parsed["password-stdin"]:
        if password:
            raise UsageError("--password and --password-stdin are mutually exclusive")
        if not user:
            raise UsageError("Must provide --username with --password-stdin")
        return user, sys.stdin.read().rstrip("\r\n")
    if not user:
        if not os.isatty(0):
            raise Invalid("Cannot perform an interactive login from a non TTY device; "
                          "use --username and --password-stdin")  # fmt: skip
        sys.stdout.write("Username: ")
        sys.stdout.flush()
        user = sys.stdin.readline().strip()
    if not password:
        if not os.isatty(0):
            raise Invalid("Cannot perform an interactive login from a non TTY device; "
                          "use --password-stdin")  # fmt: skip
        import getpass

        password = getpass.getpass("Password: ")
    if not user or not password:
        raise Invalid("username and password are required")
    return user, password


def login(context: Context, parsed: Parsed) -> None:
    """`bulkhead login`: check the credentials with the registry, then store them as docker does."""
    server = parsed.args[0] if parsed.args else credentials.HUB
    key = credentials.key_of(server)
    if "password" in parsed:
        context.err("WARNING! Using --password via the CLI is insecure. Use --password-stdin.")
    user, password = _ask(parsed)
    auth = {"username": user, "password": password, "serveraddress": key}
    found = context.call("image.login", {"auth": auth})
    token = found.get("IdentityToken", "") if isinstance(found, dict) else ""
    config = credentials.load(context)
    helper = credentials.helper_for(config, key)
    if helper:
        record = {"ServerURL": key, "Username": user, "Secret": password}
        if token:
            record |= {"Username": "<token>", "Secret": token}
        credentials.ask_helper(helper, "store", json.dumps(record))
    else:
        # As docker files it: with a token the password is not kept.
        coded = base64.b64encode(f"{user}:{'' if token else password}".encode()).decode()
        kept = {"auth": coded} | ({"identitytoken": token} if token else {})
        config.setdefault("auths", {})[key] = kept
        path = credentials.store(context, config)
        context.err(f"WARNING! Your credentials are stored unencrypted in '{path}'.")
    context.out("Login Succeeded")


def logout(context: Context, parsed: Parsed) -> None:
    """`bulkhead logout`."""
    key = credentials.key_of(parsed.args[0] if parsed.args else credentials.HUB)
    config: dict[str, Any] = credentials.load(context)
    helper = credentials.helper_for(config, key)
    context.out(f"Removing login credentials for {key}")
    if helper:
        try:
            credentials.ask_helper(helper, "erase", key)
        except NotFound:
            return
    elif (config.get("auths") or {}).pop(key, None) is not None:
        credentials.store(context, config)


def search(context: Context, parsed: Parsed) -> None:
    """`bulkhead search`: there is no such thing in the distribution specification."""
    raise Unsupported("search is not supported: the OCI distribution specification has no search; "
                      "use the registry's web page")  # fmt: skip


COMMANDS = {
    "login": Command(
        "login", "Authenticate to a registry", login, arguments="[SERVER]",
        options=(
            Option("-p, --password", "string", "Password or access token"),
            Option("--password-stdin", "bool", "Take the password from stdin"),
            Option("-u, --username", "string", "Username"),
        ),
        examples=("pass registry | bulkhead login -u ada --password-stdin registry.example.com",),
        most=1,
    ),
    "logout": Command(
        "logout", "Log out from a registry", logout, arguments="[SERVER]", most=1,
        examples=("bulkhead logout registry.example.com",),
    ),
    "search": Command(
        "search", "Search for images (not supported)", search, arguments="TERM",
        options=(
            Option("-f, --filter", "list", "Filter output", hidden=True),
            Option("--format", "string", "Format output", hidden=True),
            Option("--limit", "int", "Max number of search results", hidden=True),
            Option("--no-trunc", "bool", "Don't truncate output", hidden=True),
        ),
        examples=("bulkhead search nginx",), least=1, most=1,
    ),
}  # fmt: skip
