"""Ids and invented names of workloads."""

import os
import random
import re

from bulkhead.errors import Invalid

_VALID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_ADJECTIVES = str.split(
    "able agile amber ample apt arctic balmy bold brave breezy bright brisk calm candid chief "
    "civil clean clear clever cool coral cosy crisp daring deft eager early easy fair fast fine "
    "firm fit fleet fond frank free fresh gentle glad golden good grand green handy happy hardy "
    "honest humble ideal jolly keen kind late lean light lively loyal lucid lucky mellow merry "
    "mild modest neat nimble noble patient placid plain polite prime proud quick quiet rapid "
    "ready regal robust rosy round safe serene sharp silent simple sleek smart snug sober solid "
    "sound steady sunny sure swift tidy tranquil trim true trusty upbeat vivid warm wise witty"
)
_SHIPS = str.split(
    "anchor ballast barge barque beacon beam berth boom bosun bow bowline brig buoy cabin cable "
    "canvas capstan captain caravel catamaran chart clipper coaster compass corvette crew current "
    "cutter davit deck dinghy dock dory ferry fender fjord fleet frigate funnel galley gangway "
    "gunwale halyard harbour hatch hawser helm hull jetty jib junk kayak keel ketch knot lagoon "
    "lantern lateen lighter log lugger mast mate mizzen mooring oar outrigger packet pier pilot "
    "pinnace port prow punt quay raft reef rigging rudder sail schooner scow sextant sheet shoal "
    "skiff sloop spar spinnaker starboard stern tender tide tiller topsail trawler tug wake winch"
)


def new_id() -> str:
    """64 hexadecimal digits; never all decimal in the first twelve, as short ids are hostnames."""
    while True:
        identity = os.urandom(32).hex()
        if not identity[:12].isdecimal():
            return identity


def invent(taken: "dict[str, str] | set[str]", attempt: int = 0) -> str:
    """A name like "steady_ketch" that is not in `taken`."""
    while True:
        name = f"{random.choice(_ADJECTIVES)}_{random.choice(_SHIPS)}"  # noqa: S311 no secret
        if attempt:
            name += str(random.randrange(10 ** min(attempt, 9)))  # noqa: S311
        if name not in taken:
            return name
        attempt += 1


def check(name: str) -> str:
    """`name` without a leading slash; Invalid unless it is allowed."""
    text = name.removeprefix("/")
    if not _VALID.fullmatch(text):
        raise Invalid(
            f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )
    return text
