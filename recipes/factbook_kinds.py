# ruff: noqa: E501 -- a table: one kind of question per row pair
"""The kinds of question asked of the Factbook: where the field stands, how it is asked, how its answer is read off."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Extract = Callable[[str], list[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of question: where its field stands, how it is asked, how its answers are read off.

    `{year}` in a path and a wording asks once for each year that the field gives. The last wording is kept for tests.
    """

    name: str
    path: tuple[str, ...]
    wordings: tuple[str, ...]
    extract: Extract


def _amount(*units: str) -> Extract:
    """Reads `number unit`; the bare number is accepted too. Units are regular expressions, tried in order."""
    pattern = re.compile(r"(-?\$?-?\d[\d,.]*(?:\s(?:million|billion|trillion))?)\s?(" + "|".join(units) + ")")

    def extract(text: str) -> list[str]:
        match = pattern.match(text)
        if not match:
            return []
        number, unit = match.group(1).strip(), match.group(2)
        separator = "" if unit in ("", "%") else " "
        return list(dict.fromkeys([f"{number}{separator}{unit}", number]))

    return extract


def _name(text: str) -> list[str]:
    """Reads a name up to a parenthesis, a semicolon or a note; the whole field is accepted too."""
    short = re.split(r"\s*[(;]|,? note\b| in Romanian", text)[0].strip()
    return list(dict.fromkeys(filter(None, [short, text]))) if 0 < len(short) <= 60 else []


def _place_with_height(text: str) -> list[str]:
    """Reads `Grossglockner 3,798 m`: the place, or the place with its height."""
    match = re.fullmatch(r"([^()\d]+?)\s*(?:\([^)]*\)\s*)?(-?[\d,.]+(?: m)?)", text)
    return [match.group(1), text] if match else []


YEARS = ("2024", "2023", "2022")

KINDS: tuple[Kind, ...] = (
    Kind("capital", ("Government", "Capital", "name"),
         ("What is the capital of {title}?", "Which city is the capital of {title}?", "Name {title}'s capital."), _name),
    Kind("area", ("Geography", "Area", "total"),
         ("What is the total area of {title}?", "How large is {title} in total?", "How big is the total area that {title} covers?"), _amount("sq km")),
    Kind("land_boundaries", ("Geography", "Land boundaries", "total"),
         ("How long are the land boundaries of {title} in total?", "What is the total length of {title}'s land boundaries?", "Give the total length of the land boundaries of {title}."), _amount("km")),
    Kind("coastline", ("Geography", "Coastline"),
         ("How long is the coastline of {title}?", "What is the length of {title}'s coastline?", "Give the length of the coast of {title}."), _amount("km")),
    Kind("highest_point", ("Geography", "Elevation", "highest point"),
         ("What is the highest point of {title}?", "Which place is the highest point in {title}?", "Name the highest elevation point of {title}."), _place_with_height),
    Kind("lowest_point", ("Geography", "Elevation", "lowest point"),
         ("What is the lowest point of {title}?", "Which place is the lowest point in {title}?", "Name the lowest elevation point of {title}."), _place_with_height),
    Kind("mean_elevation", ("Geography", "Elevation", "mean elevation"),
         ("What is the mean elevation of {title}?", "How high is {title} on average?", "Give the average elevation of {title}."), _amount("m")),
    Kind("population", ("People and Society", "Population", "total"),
         ("What is the population of {title}?", "How many people live in {title}?", "Give the total population of {title}."), _amount("")),
    Kind("median_age", ("People and Society", "Median age", "total"),
         ("What is the median age in {title}?", "What is the total median age of {title}'s population?", "Give the median age of people in {title}."), _amount("years")),
    Kind("population_growth", ("People and Society", "Population growth rate"),
         ("What is the population growth rate of {title}?", "At what rate does the population of {title} grow?", "How fast is {title}'s population growing?"), _amount("%")),
    Kind("birth_rate", ("People and Society", "Birth rate"),
         ("What is the birth rate of {title}?", "How many births per 1,000 people are there in {title}?", "Give the birth rate in {title}."), _amount("births/1,000 population")),
    Kind("death_rate", ("People and Society", "Death rate"),
         ("What is the death rate of {title}?", "How many deaths per 1,000 people are there in {title}?", "Give the death rate in {title}."), _amount("deaths/1,000 population")),
    Kind("life_expectancy", ("People and Society", "Life expectancy at birth", "total population"),
         ("What is the life expectancy at birth in {title}?", "How long is the life expectancy of the total population of {title}?", "Give the life expectancy at birth of {title}'s total population."), _amount("years")),
    Kind("infant_mortality", ("People and Society", "Infant mortality rate", "total"),
         ("What is the infant mortality rate of {title}?", "What is the total infant mortality in {title}?", "How high is infant mortality in {title}?"), _amount("deaths/1,000 live births")),
    Kind("fertility_rate", ("People and Society", "Total fertility rate"),
         ("What is the total fertility rate of {title}?", "How many children are born per woman in {title}?", "Give the fertility rate of {title}."), _amount("children born/woman")),
    Kind("urban_population", ("People and Society", "Urbanization", "urban population"),
         ("What share of the population of {title} is urban?", "How much of {title}'s population lives in cities?", "What percentage of people in {title} live in urban areas?"), _amount("%")),
    Kind("physician_density", ("People and Society", "Physician density"),
         ("What is the physician density in {title}?", "How many physicians per 1,000 people does {title} have?", "Give the physician density of {title}."), _amount("physicians/1,000 population")),
    Kind("obesity", ("People and Society", "Obesity - adult prevalence rate"),
         ("What is the adult obesity rate in {title}?", "What is the prevalence of obesity among adults in {title}?", "How common is obesity among adults of {title}?"), _amount("%")),
    Kind("government_type", ("Government", "Government type"),
         ("What type of government does {title} have?", "What is the government type of {title}?", "How is {title} governed?"), _name),
    Kind("unemployment", ("Economy", "Unemployment rate", "Unemployment rate {year}"),
         ("What was the unemployment rate of {title} in {year}?", "How high was unemployment in {title} in {year}?", "In {year}, what was {title}'s unemployment rate?"), _amount("%")),
    Kind("inflation", ("Economy", "Inflation rate (consumer prices)", "Inflation rate (consumer prices) {year}"),
         ("What was the inflation rate of {title} in {year}?", "How high was consumer price inflation in {title} in {year}?", "In {year}, what was {title}'s inflation rate?"), _amount("%")),
    Kind("gdp_growth", ("Economy", "Real GDP growth rate", "Real GDP growth rate {year}"),
         ("What was the real GDP growth rate of {title} in {year}?", "By how much did the real GDP of {title} grow in {year}?", "In {year}, what was {title}'s real GDP growth rate?"), _amount("%")),
    Kind("gdp_per_capita", ("Economy", "Real GDP per capita", "Real GDP per capita {year}"),
         ("What was the real GDP per capita of {title} in {year}?", "How high was {title}'s real GDP per capita in {year}?", "In {year}, what was the real GDP per person in {title}?"), _amount("")),
    Kind("exports", ("Economy", "Exports", "Exports {year}"),
         ("How much were the exports of {title} worth in {year}?", "What was the value of {title}'s exports in {year}?", "In {year}, how much did {title} export?"), _amount("")),
    Kind("electricity_consumption", ("Energy", "Electricity", "consumption"),
         ("How much electricity does {title} consume?", "What is the electricity consumption of {title}?", "Give {title}'s electricity consumption."), _amount("kWh")),
    Kind("internet_users", ("Communications", "Internet users", "percent of population"),
         ("What percentage of the population of {title} uses the internet?", "What share of people in {title} are internet users?", "How many percent of {title}'s people are online?"), _amount("%")),
    Kind("internet_country_code", ("Communications", "Internet country code"),
         ("What is the internet country code of {title}?", "Which internet country code does {title} use?", "Give the internet domain code of {title}."), _name),
    Kind("airports", ("Transportation", "Airports"),
         ("How many airports does {title} have?", "What is the number of airports in {title}?", "Give the number of airports of {title}."), _amount("")),
    Kind("railways", ("Transportation", "Railways", "total"),
         ("How long is the railway network of {title} in total?", "What is the total length of railways in {title}?", "Give the total length of {title}'s railways."), _amount("km")),
    Kind("military_expenditures", ("Military and Security", "Military expenditures", "Military Expenditures {year}"),
         ("What share of GDP were the military expenditures of {title} in {year}?", "How much of its GDP did {title} spend on the military in {year}?", "In {year}, what were {title}'s military expenditures as a share of GDP?"), _amount("%")),
    Kind("irrigated_land", ("Geography", "Irrigated land"),
         ("How much irrigated land does {title} have?", "What is the area of irrigated land in {title}?", "Give the irrigated land of {title}."), _amount("sq km")),
    Kind("tobacco_use", ("People and Society", "Tobacco use", "total"),
         ("What is the rate of tobacco use in {title}?", "How common is tobacco use in {title} in total?", "What share of people in {title} use tobacco?"), _amount("%")),
)  # fmt: skip
