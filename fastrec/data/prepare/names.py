# SPDX-License-Identifier: Apache-2.0
"""Which column of a table holds what: as it is said, or by names that many data sets use.

What is recognised is printed and written to schema.json; where two columns may be meant, neither is
taken.
"""

import re

from fastrec.data.errors import DataError

# In lower case, without blanks, - and _: User-ID, userId and user_id are one.
KNOWN = {
    "user": "user userid uid username reviewerid visitorid customerid memberid profileid",
    "item": "item itemid iid movieid asin parentasin businessid productid isbn trackid songid"
    " artistid articleid newsid bookid gameid animeid videoid venueid locationid poiid gmapid",
    "timestamp": "timestamp time date datetime ts unixts unixtime unixtimestamp unixreviewtime"
    " eventtime eventdate createdat tdat timems timestampms",
    "rating": "rating ratings stars overall score bookrating",
    "history": "history histories items itemids sequence itemsequence clickhistory",
    "event_type": "event eventtype behavior behaviortype behaviour action actiontype",
}
FLAGS = {
    "user": "user_column",
    "item": "item_column",
    "timestamp": "timestamp_column",
    "rating": "rating_column",
    "event_type": "event_type_column",
    "history": "history_column",
}
NONE = "none"  # of a column that may be absent: it is not recognised
_SEPARATORS = (";", "\t", "|", "::", ",", " ")


def find_columns(
    file, there: list[str], given: dict[str, str | None], header: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """({role: column}, {flag: column} of those that were recognised) of a table.

    there: its columns. given: by role, a name, "none", or None to recognise it; "user", "item" and
    "history" must be found. header: the names are the first line of a text file.
    """
    names, recognised = {}, {}
    said = set(given.values())
    for role, name in given.items():
        needed = role in ("user", "item", "history")
        if name is None:
            known = KNOWN[role].split()
            found = [each for each in there if plain(each) in known and each not in said]
            if len(found) > 1:
                also = "" if needed else f" (or {NONE})"
                raise DataError(
                    file, f"{' and '.join(found)} may both hold the {role}: --{FLAGS[role]} says"
                    f" which{also}",
                )  # fmt: skip
            if found:
                names[role] = recognised[FLAGS[role]] = found[0]
            elif needed:
                what = f"no column is known to hold the {role}: --{FLAGS[role]} names it"
                raise DataError(file, f"{what}; there are {_listed(there, header)}")
        elif name in there:
            names[role] = name
        elif needed or name != NONE:
            raise DataError(
                file, f"column is missing; there are {_listed(there, header)}", column=name
            )
    return names, recognised


def plain(name: str) -> str:
    """A name as `KNOWN` has it; nothing for one with blanks around it: its values have them too."""
    return re.sub("[_ -]", "", name.lower()) if name == name.strip() else ""


def _listed(there: list[str], header: bool) -> str:
    hint = ""
    if any(name.endswith((":token", ":float")) for name in there):
        hint = " (--format recbole reads such names)"
    elif header and len(there) == 1:
        seen = next((f", perhaps {each!r}" for each in _SEPARATORS if each in there[0]), "")
        hint = f" (--separator says what stands between columns{seen})"
    elif header:
        hint = (
            f" (if this first line is a row, --columns names its {len(there)} columns in order,"
            " such as user,item,rating,time)"
        )
    return ", ".join(there) + hint
