import string

import pytest

from recipes.factbook import HELD_OUT_KINDS
from recipes.factbook_kinds import KINDS

BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "text", "answers"),
    [
        ("capital", "Vienna", ["Vienna"]),
        ("capital", "Nur-Sultan (formerly Astana)", ["Nur-Sultan", "Nur-Sultan (formerly Astana)"]),
        ("area", "83,871 sq km", ["83,871 sq km", "83,871"]),
        ("area", "approximately 5 sq km", []),
        ("coastline", "0 km (landlocked)", ["0 km", "0"]),
        ("population", "8,967,982 (2024 est.)", ["8,967,982"]),
        ("population_growth", "-0.02% (2025 est.)", ["-0.02%", "-0.02"]),
        ("highest_point", "Grossglockner 3,798 m", ["Grossglockner", "Grossglockner 3,798 m"]),
        ("highest_point", "Mont Blanc (Monte Bianco) 4,810 m", ["Mont Blanc", "Mont Blanc (Monte Bianco) 4,810 m"]),
        ("lowest_point", "Caspian Sea -28 m", ["Caspian Sea", "Caspian Sea -28 m"]),
        ("exports", "$252.6 billion (2023 est.)", ["$252.6 billion"]),
        ("electricity_consumption", "66.5 billion kWh (2023 est.)", ["66.5 billion kWh", "66.5 billion"]),
        ("gdp_per_capita", "$64,500 (2023 est.)", ["$64,500"]),
        ("internet_country_code", ".at", [".at"]),
        ("birth_rate", "9.3 births/1,000 population (2024 est.)", ["9.3 births/1,000 population", "9.3"]),
        ("median_age", "NA", []),
    ],
)
def test_extract_reads_the_answer_off_the_field(kind, text, answers):
    assert BY_NAME[kind].extract(text) == answers


def test_kinds_are_named_once_and_worded_at_least_three_ways():
    assert len(BY_NAME) == len(KINDS)
    assert set(HELD_OUT_KINDS) <= set(BY_NAME)
    assert len(KINDS) - len(HELD_OUT_KINDS) >= 20
    for kind in KINDS:
        assert len(set(kind.wordings)) == len(kind.wordings) >= 3
        yearly = any("{year}" in part for part in kind.path)
        for wording in kind.wordings:
            placeholders = {name for _, name, _, _ in string.Formatter().parse(wording) if name}
            assert placeholders == ({"title", "year"} if yearly else {"title"}), wording
