"""The choice of a boundary: words, facts, rules, advice and the policy."""

import contextlib
import tomllib
from importlib import resources
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.choosing import costs, documents, facts, policy, rules, words
from bulkhead.choosing.advice import Advice, advise, require
from bulkhead.choosing.facts import FIRM, HINT, SAID, Statement, gather, statement
from bulkhead.choosing.policy import BOUNDARIES
from bulkhead.errors import BulkheadError, Conflict, Internal, Invalid
from bulkhead.home import Home
from tests.unit.choosing_table import CASES, CONTRADICTIONS, OTHERS, SAME, Case


def answer(text: str) -> Advice:
    return advise(words.read(text), changes=False)


def ids(case: Case) -> str:
    return case.name


def test_there_are_forty() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_boundary_an_expert_would_choose(case: Case) -> None:
    found = answer(case.text)
    assert found.boundary == case.boundary, (found.conflicts, found.facts.values, found.points)
    cited = {fact for why in found.reasons for fact in why.facts}
    assert set(case.because) <= cited


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_other_words_for_the_same_get_the_same_answer(case: Case) -> None:
    for text in case.again:
        found = answer(text)
        assert found.boundary == case.boundary, (text, found.conflicts, found.facts.values)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_one_changed_fact_flips_the_answer(case: Case) -> None:
    old, new = case.flip
    assert old in case.text and case.flipped != case.boundary
    found = answer(case.text.replace(old, new))
    assert found.boundary == case.flipped, (found.conflicts, found.facts.values, found.points)


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_needs_that_contradict_each_other_are_refused(text: str) -> None:
    found = answer(text)
    assert not found.boundary and found.conflicts
    with pytest.raises(Conflict, match="contradict each other"):
        require(found)


@pytest.mark.parametrize("row", SAME, ids=lambda row: row[0])
def test_sentences_that_say_the_same_state_the_same(row: tuple[str, ...]) -> None:
    stated = [{(one.key, one.value) for one in words.read(text)} for text in row]
    assert stated[0] and all(one == stated[0] for one in stated), list(
        zip(row, stated, strict=True)
    )


@pytest.mark.parametrize(("text", "boundary"), OTHERS)
def test_phrases_that_belong_to_no_case(text: str, boundary: str) -> None:
    assert answer(text).boundary == boundary


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_case_space_and_typography_do_not_matter(case: Case) -> None:
    plain = {(one.key, one.value) for one in words.read(case.text)}
    for text in (case.text.upper(), "  " + case.text.replace(" ", "  "), case.text.lower()):
        assert {(one.key, one.value) for one in words.read(text)} == plain


@given(st.text(max_size=400))
def test_any_text_is_read(text: str) -> None:
    for one in words.read(text):
        assert one.value in facts.keys()[one.key].values
    advise(words.read(text), changes=False)


def test_the_vocabulary_states_facts_that_there_are() -> None:
    for entry in words.vocabulary():
        for stated in (entry.says, entry.denied):
            if stated:
                statement(stated, "")


def test_every_fact_and_value_can_be_said_or_is_what_is_assumed() -> None:
    said = {one for entry in words.vocabulary() for one in (entry.says, entry.denied)}
    unsaid = {"hardware=none", "separation=any", "arch=native", "kernel=any", "tenancy=one"}
    for name, key in facts.keys().items():
        for value in list(key.values)[1:]:
            if name not in ("rights", "start", "init", "virtualisation"):
                assert f"{name}={value}" in said | unsaid or name in ("state", "life"), (
                    name,
                    value,
                )


def test_every_rule_has_a_reason_and_a_source_and_can_fire() -> None:
    found = rules.load()
    assert found.version >= 1 and found.date
    for rule in found.rules:
        assert rule.reason.endswith(".") and rule.source
        values = {key: choice[-1].removeprefix("~") for key, choice in rule.when.items()}
        there = gather([Statement(key, value) for key, value in values.items()])
        assert rule.fires(there), rule.name
        assert not rule.fires(gather([])), rule.name


@pytest.mark.parametrize(
    "row",
    ["when = {no = 'x'}", "when = {os = 'dos'}", "when = {os = 'windows'}\nonly = ['jail']",
     "when = {os = 'windows'}\nwhat = 1"],
)  # fmt: skip
def test_rules_that_nobody_could_follow_are_found(row: str) -> None:
    with pytest.raises(Internal):
        text = f"version = 1\ndate = ''\n[sources]\na = 'b'\n[rules.x]\n{row}\n"
        rules.parse(tomllib.loads(text + "reason = 'r.'\nsource = 'a'\n"))


def test_what_would_change_the_answer_does() -> None:
    stated = [statement("trust=own", "", SAID)]
    found = advise(stated)
    assert found.boundary == "container" and found.changes
    for change in found.changes:
        key, _, value = change.fact.partition("=")
        others = [one for one in stated if one.key != key]
        again = advise([*others, Statement(key, value)], changes=False)
        assert again.boundary == change.boundary != found.boundary


@given(
    st.lists(
        st.sampled_from([(n, v) for n, k in facts.keys().items() for v in k.values]), max_size=8
    )
)
def test_the_answer_is_never_one_that_a_rule_excludes(stated: list[tuple[str, str]]) -> None:
    found = advise([Statement(key, value) for key, value in stated], changes=False)
    if found.boundary:
        assert found.boundary in BOUNDARIES
        assert all(found.boundary not in why.excludes for why in found.reasons)
        assert found.alternative and found.against
    else:
        assert found.conflicts
    # The order in which facts are told does not matter.
    turned = advise([Statement(key, value) for key, value in reversed(stated)], changes=False)
    assert turned.boundary == found.boundary


def test_a_hint_gives_way_to_a_firm_word_and_a_statement_does_not() -> None:
    hint = Statement("state", "volumes", HINT)
    said = Statement("state", "volumes", SAID)
    firm = Statement("state", "none", FIRM)
    assert gather([hint, firm]).value("state") == "none"
    assert not gather([hint, firm]).clashes
    assert gather([said, firm]).clashes


def test_facts_that_are_none_are_told_what_there_is() -> None:
    with pytest.raises(Invalid, match="there is no 'mine', only own, vetted"):
        statement("trust=mine", "")
    with pytest.raises(Invalid, match="KEY=VALUE with one of trust"):
        statement("trust", "")


# --- the policy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("untrusted: mircovm", "there is no boundary 'mircovm'"),
        ("require-kvm: yes", "Expected `bool`"),
        ("a: 1\na: 2", "p.yaml:2:1: 'a' is there twice"),
        ("colour: red", "unknown field `colour`"),
        ("- container", "a policy is a mapping"),
        ("version: 2", "version 2 is not known"),
        ("allow: []", "names no boundary"),
        ("default: vm\nallow: [container]", "default: vm is not in allow"),
        ("source: /etc/passwd", "a policy is a mapping"),
        ("allow: [", "p.yaml:"),
    ],
)
def test_a_policy_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        policy.parse(text, "p.yaml")
    assert said in caught.value.message


def test_no_policy_is_all_defaults_and_a_changed_one_is_read_again(tmp_path: Path) -> None:
    home = Home(str(tmp_path), str(tmp_path))
    assert policy.load(home) is policy.NONE and not policy.load(home).given
    (tmp_path / "policy.yaml").write_text("untrusted: microvm\nrequire-kvm: true\n")
    found = policy.load(home)
    assert (found.untrusted, found.require_kvm, found.given) == ("microvm", True, True)
    assert policy.load(home) is found
    (tmp_path / "policy.yaml").write_text("untrusted: vm\n")
    assert policy.load(home).untrusted == "vm"


UNTRUSTED = [Statement("trust", "untrusted")]


def test_the_policy_decides_within_what_the_rules_leave() -> None:
    assert advise(UNTRUSTED, policy.parse("untrusted: vm", "p")).boundary == "vm"
    few = policy.parse("allow: [container, sandbox]", "p")
    assert advise(UNTRUSTED, few).boundary == "sandbox"
    nothing = advise(UNTRUSTED, policy.parse("allow: [container]", "p"))
    assert not nothing.boundary and "The policy allows container only" in nothing.conflicts[0]
    emulated = [*UNTRUSTED, Statement("kvm", "no")]
    strict = policy.parse("untrusted: microvm\nrequire-kvm: true", "p")
    assert not advise(emulated, strict).boundary
    assert advise([*UNTRUSTED, Statement("kvm", "yes")], strict).boundary == "microvm"
    assert advise([], policy.parse("default: sandbox", "p")).boundary == "sandbox"
    assert advise([], policy.parse("needs: {tenancy: strangers}", "p")).boundary == "microvm"


# --- documents


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper"),
        ("a: &a [*a]", "nothing whole is called 'a'"),
        ("? [a]\n: 1", "a key must be a word"),
        ("a: b: c", "f:1:5"),
        ("\x00", "f:"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        documents.yaml_documents(text, "f")
    assert said in caught.value.message


def test_yaml_does_not_grow_by_aliases() -> None:
    lines = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(Invalid, match="aliases counted"):
        documents.yaml_documents("\n".join(lines), "f")


def test_yaml_is_read_by_the_core_schema() -> None:
    text = "x: &x {a: on, b: 010, c: 1:30}\ny: {<<: *x, a: ~}\nz: ['1', 0x10, 1.5, true, !!str 5]\n"
    assert documents.yaml_document(text, "f") == {
        "x": {"a": "on", "b": 10, "c": "1:30"},
        "y": {"a": None, "b": 10, "c": "1:30"},
        "z": ["1", 16, 1.5, True, "5"],
    }


@given(st.text(max_size=200))
def test_any_yaml_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(Invalid):
        documents.yaml_documents(text, "f")


@pytest.mark.parametrize(
    "text",
    [
        b'<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]><domain>&e;</domain>',
        b'<!DOCTYPE d SYSTEM "http://example.invalid/d.dtd"><domain/>',
        b"<domain>&e;</domain>",
        b"<domain>",
    ],
)
def test_xml_with_a_document_type_or_entities_is_refused(text: bytes) -> None:
    with pytest.raises(Invalid):
        documents.xml_root(text, "f")


# --- costs


def test_costs_are_those_measured_and_nothing_else(tmp_path: Path) -> None:
    home = Home(str(tmp_path), str(tmp_path))
    assert costs.load(home) is None
    assert costs.shown(None, "container") == [costs.NOTHING]
    written = {
        "version": 1, "made": "2026-11-21T22:00:00Z", "image": "busybox",
        "boundaries": {
            "container": {"start_warm_ms": {"median": 41.0, "low": 39.5, "high": 43.0}},
            "microvm": {"start_warm_ms": {"median": 190.0}, "memory_mib": {"median": 31.5}},
        },
    }  # fmt: skip
    (tmp_path / "compare.json").write_bytes(msgspec.json.encode(written))
    found = costs.load(home)
    assert costs.shown(found, "microvm", "container") == [
        "start, warm: 190 ms; container 41 ms",
        "memory of the boundary itself, each: 31.5 MiB",
        "measured 2026-11-21T22:00:00Z with busybox",
    ]
    assert "39.5 to 43" in costs.shown(found, "container")[0]
    assert "sandbox was not measured" in costs.shown(found, "sandbox")[0]
    for broken in (b"{", b'{"version": 2, "boundaries": {}}', b"[]"):
        (tmp_path / "compare.json").write_bytes(broken)
        with pytest.raises(BulkheadError):
            costs.load(home)


def test_the_data_are_toml_with_editions() -> None:
    for name in ("facts.toml", "rules.toml", "vocabulary.toml"):
        text = resources.files("bulkhead.choosing").joinpath(name).read_text("utf-8")
        assert tomllib.loads(text)["version"] >= 1
