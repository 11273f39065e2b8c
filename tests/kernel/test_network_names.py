"""Names in workloads: the real helper process, asked from inside."""

from pathlib import Path

import dns.message
import dns.query
import dns.rcode

from tests.helpers.network_lab import EndpointRequest, Lab, Workload, in_lab

PATIENCE_S = 30.0


def _ask(workload: Workload, name: str, kind: str = "A", *, tcp: bool = False) -> list[str]:
    query = dns.message.make_query(name, kind)
    send = dns.query.tcp if tcp else dns.query.udp

    def work() -> dns.message.Message:
        return send(query, "127.0.0.11", timeout=PATIENCE_S)

    answer = workload.inside(work)
    if answer.rcode():
        return [dns.rcode.to_text(answer.rcode())]
    return sorted(item.to_text() for rrset in answer.answer for item in rrset)


@in_lab
def test_names_and_aliases(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app", Internal=True)
        lab.network("back", Internal=True)
        web = lab.run("web", "app", endpoints={"app": EndpointRequest(aliases=("www",))})
        db = lab.run("db", "back")
        client = lab.run("client", "app")
        lab.start_helper()
        for name in ("web.", "www.", "web.app.", f"{web.id[:12]}."):
            assert _ask(client, name) == [web.address("app")]
        assert _ask(client, "web.", tcp=True) == [web.address("app")]
        assert _ask(client, "db.") == ["SERVFAIL"]
        assert _ask(db, "web.") == ["SERVFAIL"]
        reverse = ".".join(reversed(web.address("app").split("."))) + ".in-addr.arpa."
        assert _ask(client, reverse, "PTR") == ["web.app."]
        assert _ask(db, reverse, "PTR") == ["SERVFAIL"]
        lab.manager.connect(db.id, "app", EndpointRequest())
        lab.sync()
        assert _ask(client, "db.") == [db.address("app")]
        lab.manager.rename(web.id, "shop")
        lab.sync()
        assert _ask(client, "shop.") == [web.address("app")]
        lab.stop(web)
        lab.sync()
        assert _ask(client, "shop.") == ["SERVFAIL"]


@in_lab
def test_names_survive_the_helper(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.network("app", Internal=True)
        web, client = lab.run("web", "app"), lab.run("client", "app")
        lab.start_helper()
        assert _ask(client, "web.") == [web.address("app")]
        lab.stop_helper()
        lab.start_helper()
        assert _ask(client, "web.") == [web.address("app")]
        assert _ask(client, "web.", tcp=True) == [web.address("app")]
