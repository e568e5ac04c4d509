"""Our word lists: common English words for prompts, with what their grammar needs."""

from __future__ import annotations


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """(singular, plural) of "singular/plural" between spaces."""
    return tuple((singular, plural) for singular, plural in (pair.split("/") for pair in text.split()))


NOUNS = _pairs(
    """
    friend/friends teacher/teachers doctor/doctors lawyer/lawyers farmer/farmers soldier/soldiers officer/officers
    worker/workers writer/writers driver/drivers player/players leader/leaders member/members student/students
    parent/parents father/fathers mother/mothers brother/brothers sister/sisters son/sons daughter/daughters
    king/kings queen/queens judge/judges guard/guards pilot/pilots artist/artists actor/actors author/authors
    boy/boys girl/girls chief/chiefs citizen/citizens neighbor/neighbors president/presidents secretary/secretaries
    minister/ministers governor/governors senator/senators agent/agents owner/owners customer/customers
    engineer/engineers manager/managers servant/servants merchant/merchants captain/captains general/generals
    president/presidents nation/nations state/states army/armies committee/committees department/departments
    """
)
"""(singular, plural) of beings and bodies that can do what `VERBS` say."""

PLACES = _pairs(
    """
    house/houses school/schools church/churches office/offices bank/banks farm/farms road/roads river/rivers
    tree/trees table/tables desk/desks door/doors window/windows garden/gardens field/fields bridge/bridges
    ship/ships town/towns mountain/mountains building/buildings station/stations store/stores court/courts
    port/ports mill/mills mine/mines road/roads land/lands city/cities
    """
)
"""(singular, plural) of what one can be near."""

PREPOSITIONS: tuple[str, ...] = ("near", "behind", "beside", "by", "above", "from", "in", "of")

ANSWERS: tuple[tuple[str, str], ...] = (("has", "have"), ("is", "are"), ("was", "were"), ("does", "do"))
"""(singular, plural) of verbs that follow any subject."""

VERBS = _pairs(
    """
    likes/like knows/know sees/see wants/want needs/need loves/love follows/follow fears/fear trusts/trust
    supports/support helps/help finds/find meets/meet calls/call serves/serve
    """
)
"""(singular, plural) of verbs with an object."""

NAMES: tuple[str, ...] = tuple(
    """
    John Mary James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven
    Andrew George Kevin Brian Edward Ronald Jason Jeffrey Ryan Jacob Gary Eric Stephen Larry Justin Scott Frank Henry
    Adam Peter Patrick Jack Alexander Simon Sarah Karen Lisa Nancy Anna Emma Laura Amy Rachel Maria Kate Alice Jane
    Susan Helen Martha Rose Grace Elizabeth Margaret Jefferson Jackson Lincoln Washington Adams Madison Monroe Grant
    Wilson Truman Johnson Clinton Bush Carter Ford Taylor
    """.split()  # noqa: SIM905
)
"""First names, and family names that serve as well."""

NATIONS: tuple[str, ...] = tuple(
    """
    America Britain China Congress Cuba England Europe France Germany Italy Japan Mexico Russia Spain Texas
    """.split()  # noqa: SIM905
)
"""Bodies that can do what people do in the sentences of indirect object identification."""

IOI_PLACES: tuple[str, ...] = ("store", "school", "office", "station", "house", "church", "garden", "city")
IOI_OBJECTS: tuple[str, ...] = ("drink", "book", "letter", "ring", "gift", "paper", "map", "bill")
IOI_VERBS: tuple[str, ...] = ("gave", "sent", "offered", "returned")
IOI_TEMPLATES: tuple[str, ...] = (
    "When {first} and {second} went to the {place}, {subject} {verb} a {object} to",
    "After {first} and {second} came from the {place}, {subject} {verb} a {object} to",
    "While {first} and {second} were at the {place}, {subject} {verb} the {object} to",
    "Then {first} and {second} had a long day at the {place}, and {subject} {verb} a {object} to",
)
