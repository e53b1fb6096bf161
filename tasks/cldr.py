"""Facts from Unicode CLDR through the Babel package: names in English and French, currencies, languages, units, dates.

All French strings come from CLDR; none is translated by hand. No-break spaces and typographic apostrophes are replaced
by ASCII ones, so that both languages share one tokenisation.
"""

import dataclasses
import datetime
import functools

from babel import Locale, dates, languages, lists, numbers, units
from babel.core import get_global
from num2words import num2words

# ISO 3166 codes of the countries to use: their names are one word or a short phrase in both languages.
# fmt: off
_COUNTRIES = (
    "AR", "AU", "BR", "CA", "CL", "CN", "CO", "CU", "DE", "DK", "EG", "ES", "FI", "FR", "GB", "GE", "GR", "HU",
    "IE", "IN", "IS", "IT", "JP", "KR", "MA", "MX", "NL", "NO", "NZ", "PE", "PH", "PL", "PT", "RO", "RU", "SA", "SE",
    "TH", "TN", "TR", "UA", "US", "VN", "ZA",
)
# fmt: on

UNITS = {
    "length": ("length-kilometer", "length-meter", "length-centimeter", "length-mile"),
    "mass": ("mass-kilogram", "mass-gram", "mass-tonne"),
    "duration": ("duration-day", "duration-week", "duration-month", "duration-hour", "duration-minute"),
    "volume": ("volume-liter", "volume-milliliter", "volume-cubic-meter"),
    "area": ("area-hectare", "area-square-kilometer", "area-square-meter"),
    "speed": ("speed-kilometer-per-hour", "speed-meter-per-second"),
    "temperature": ("temperature-celsius", "temperature-fahrenheit"),
    "power": ("power-watt", "power-kilowatt"),
}
"""CLDR units by measured quantity."""


def plain(text: str) -> str:
    """Replaces typographic spaces, apostrophes and dashes by ASCII ones."""
    return text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2019", "'").replace("\u2013", "-")


@functools.cache
def _locale(language: str) -> Locale:
    return Locale(language)


@dataclasses.dataclass(frozen=True)
class Country:
    """A country with its facts from CLDR.

    Attributes:
      code: ISO 3166 code.
      english, french: its names.
      currency: ISO 4217 code of its only current currency.
      language: code of its first official (or de facto official) language.
      city: the city that names its time zone, in English; empty if it has several time zones.
    """

    code: str
    english: str
    french: str
    currency: str
    language: str
    city: str


@functools.cache
def countries() -> tuple[Country, ...]:
    """Returns the countries in alphabetical order of their codes."""
    found = []
    for code in sorted(_COUNTRIES):
        zones = get_global("territory_zones").get(code, ())
        official = [o for o in languages.get_official_languages(code, de_facto=True) if o in _locale("fr").languages]
        found.append(
            Country(
                code=code,
                english=plain(_locale("en").territories[code]),
                french=plain(_locale("fr").territories[code]),
                currency=numbers.get_territory_currencies(code)[0],
                language=official[0],
                city=plain(dates.get_timezone_location(zones[0], locale="en", return_city=True))
                if len(zones) == 1
                else "",
            )
        )
    return tuple(found)


@functools.cache
def currency_name(code: str, language: str, count: int | None = None) -> str:
    """Returns the name of a currency in the plural form for `count`: 'Japanese yen', 'yens japonais'."""
    return plain(numbers.get_currency_name(code, count=2 if count is None else count, locale=language))


def currency_label(code: str, language: str) -> str:
    """Returns the singular name of a currency: 'Japanese yen', 'yen japonais'."""
    return currency_name(code, language, 1)


def language_name(code: str, language: str) -> str:
    """Returns the name of a language: 'Japanese', 'japonais'."""
    return plain(_locale(language).languages[code])


def script_name(language_code: str) -> str:
    """Returns the English name of the usual script of a language, from CLDR's likely subtags; "" if unknown."""
    likely = get_global("likely_subtags").get(language_code, "")
    scripts = [part for part in likely.split("_") if len(part) == 4]
    return plain(_locale("en").scripts[scripts[0]]) if scripts else ""


@functools.cache
def amount(value: int, unit: str, language: str) -> str:
    """Returns an amount of a unit in words: '15 kilometers', '15 kilomètres'."""
    return plain(units.format_unit(value, unit, locale=language))


def unit_words(value: int, unit: str, language: str) -> str:
    """Returns an amount with the number in words: 'fifteen kilometers', 'quinze kilomètres'."""
    return amount(value, unit, language).replace(str(value), number_words(value, language), 1)


@functools.cache
def number_words(value: int, language: str) -> str:
    """Returns a number in words: 'forty-seven', 'quarante-sept'."""
    return plain(num2words(value, lang=language))


def weekday_date(date: datetime.date, language: str) -> str:
    """Returns 'Monday, March 3' or 'lundi 3 mars'."""
    return plain(dates.format_skeleton("MMMMEEEEd", date, locale=language))


def long_date(date: datetime.date, language: str) -> str:
    """Returns 'March 3, 2025' or '3 mars 2025'."""
    return plain(dates.format_date(date, "long", locale=language))


def day_month(date: datetime.date, language: str) -> str:
    """Returns 'March 3' or '3 mars'."""
    return plain(dates.format_skeleton("MMMMd", date, locale=language))


def month_year(date: datetime.date, language: str) -> str:
    """Returns 'March 2025' or 'mars 2025'."""
    return plain(dates.format_skeleton("yMMMM", date, locale=language))


def weekday(day: int, language: str) -> str:
    """Returns the name of a day of the week, 0 = Monday: 'Monday', 'lundi'."""
    return plain(dates.get_day_names("wide", locale=language)[day])


def time_of_day(time: datetime.time, language: str) -> str:
    """Returns '3:30 PM' or '15:30'."""
    return plain(dates.format_time(time, "short", locale=language))


def listing(items: tuple[str, ...], language: str) -> str:
    """Returns 'A, B, and C' or 'A, B et C'."""
    return plain(lists.format_list(items, locale=language))
