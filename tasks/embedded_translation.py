"""English to French, composed from CLDR names and formats, so that the French is correct by construction.

Ten sentence frames are filled with dates, times, amounts, prices, countries and languages. Test sentences are new
combinations of parts that occur in training.
"""

import datetime
import functools
import random
from collections.abc import Callable

from diffusion_lm_tasks import cldr
from diffusion_lm_tasks.splits import Example, deal

PREFIX = "to French: "
SIZES = {"train": 16_000, "validation": 400, "test": 400}

Pair = tuple[str, str]

_QUANTITIES = {
    "length": ("distance", "La distance"),
    "mass": ("mass", "La masse"),
    "duration": ("duration", "La durée"),
    "volume": ("volume", "Le volume"),
    "area": ("area", "La superficie"),
    "speed": ("speed", "La vitesse"),
    "temperature": ("temperature", "La température"),
    "power": ("power", "La puissance"),
}
_SPEAKERS = (("I speak", "Je parle"), ("You speak", "Vous parlez"), ("We speak", "Nous parlons"))
_SPEAKERS += (("They speak", "Ils parlent"), ("She speaks", "Elle parle"), ("He speaks", "Il parle"))
_VEHICLES = (("train", "Le train"), ("bus", "Le bus"), ("plane", "L'avion"), ("boat", "Le bateau"))
_GOODS = (("ticket", "Le billet"), ("book", "Le livre"), ("meal", "Le repas"), ("room", "La chambre"))
_EVENTS = (("meeting", "La réunion"), ("concert", "Le concert"), ("exam", "L'examen"), ("course", "Le cours"))
_PLACES = (("shop", "Le magasin est"), ("museum", "Le musée est"), ("library", "La bibliothèque est"))


def _date(rng: random.Random) -> datetime.date:
    # Excludes the first of a month: French writes "1er", but CLDR's formats do not.
    return datetime.date(rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(2, 28))


def _time(rng: random.Random) -> datetime.time:
    return datetime.time(rng.randint(1, 23), rng.choice((0, 15, 30, 45)))


def _number(rng: random.Random) -> int:
    return rng.randint(2, 99) if rng.random() < 0.7 else 50 * rng.randint(2, 19)


def _word_number(rng: random.Random) -> int:
    # Excludes numbers that end in 1: "un" and "une" agree with the noun, which CLDR's patterns do not support.
    return rng.choice([n for n in range(2, 70) if n % 10 != 1])


def _amount(rng: random.Random, quantity: str) -> Pair:
    unit = rng.choice(cldr.UNITS[quantity])
    if rng.random() < 0.3:
        value = _word_number(rng)
        return cldr.unit_words(value, unit, "en"), cldr.unit_words(value, unit, "fr")
    value = _number(rng)
    return cldr.amount(value, unit, "en"), cldr.amount(value, unit, "fr")


def _price(rng: random.Random) -> Pair:
    value, code = _number(rng), rng.choice(cldr.countries()).currency
    return f"{value} {cldr.currency_name(code, 'en', value)}", f"{value} {cldr.currency_name(code, 'fr', value)}"


def _quantity(rng: random.Random) -> Pair:
    quantity = rng.choice(sorted(_QUANTITIES))
    (en, fr), (value, valeur) = _QUANTITIES[quantity], _amount(rng, quantity)
    return f"The {en} is {value}.", f"{fr} est de {valeur}."


def _cost(rng: random.Random) -> Pair:
    (en, fr), (value, valeur) = rng.choice(_GOODS), _price(rng)
    return f"The {en} costs {value}.", f"{fr} coûte {valeur}."


def _event(rng: random.Random) -> Pair:
    (en, fr), date = rng.choice(_EVENTS), _date(rng)
    return f"The {en} is on {cldr.weekday_date(date, 'en')}.", f"{fr} a lieu le {cldr.weekday_date(date, 'fr')}."


def _departure(rng: random.Random) -> Pair:
    (en, fr), day, time = rng.choice(_VEHICLES), rng.randrange(7), _time(rng)
    verb, verbe = rng.choice((("leaves", "part"), ("arrives", "arrive")))
    return (
        f"The {en} {verb} on {cldr.weekday(day, 'en')} at {cldr.time_of_day(time, 'en')}.",
        f"{fr} {verbe} {cldr.weekday(day, 'fr')} à {cldr.time_of_day(time, 'fr')}.",
    )


def _opening_hours(rng: random.Random) -> Pair:
    (en, fr), (first, last), time = rng.choice(_PLACES), sorted(rng.sample(range(7), 2)), _time(rng)
    opened = "ouverte" if fr.startswith("La") else "ouvert"
    if rng.random() < 0.5:
        return f"The {en} is open until {cldr.time_of_day(time, 'en')}.", (
            f"{fr} {opened} jusqu'à {cldr.time_of_day(time, 'fr')}."
        )
    return (
        f"The {en} is open from {cldr.weekday(first, 'en')} to {cldr.weekday(last, 'en')}.",
        f"{fr} {opened} du {cldr.weekday(first, 'fr')} au {cldr.weekday(last, 'fr')}.",
    )


def _closed(rng: random.Random) -> Pair:
    (en, fr), (start, end) = rng.choice(_PLACES), (_date(rng), _date(rng))
    closed = "fermée" if fr.startswith("La") else "fermé"
    return (
        f"The {en} is closed from {cldr.day_month(start, 'en')} to {cldr.day_month(end, 'en')}.",
        f"{fr} {closed} du {cldr.day_month(start, 'fr')} au {cldr.day_month(end, 'fr')}.",
    )


def _exhibition(rng: random.Random) -> Pair:
    (verb, verbe), date = rng.choice((("opens", "ouvre"), ("closes", "ferme"))), _date(rng)
    return (
        f"The exhibition {verb} in {cldr.month_year(date, 'en')}.",
        f"L'exposition {verbe} en {cldr.month_year(date, 'fr')}.",
    )


def _country_list(rng: random.Random) -> Pair:
    chosen = rng.sample(cldr.countries(), rng.randint(2, 3))
    return (
        f"Countries: {cldr.listing(tuple(c.english for c in chosen), 'en')}.",
        f"Pays : {cldr.listing(tuple(c.french for c in chosen), 'fr')}.",
    )


def _speech(rng: random.Random) -> Pair:
    en, fr = rng.choice(_SPEAKERS)
    codes = rng.sample(sorted({c.language for c in cldr.countries()}), rng.randint(1, 2))
    return (
        f"{en} {cldr.listing(tuple(cldr.language_name(c, 'en') for c in codes), 'en')}.",
        f"{fr} {cldr.listing(tuple(cldr.language_name(c, 'fr') for c in codes), 'fr')}.",
    )


def _trip(rng: random.Random) -> Pair:
    country, unit = rng.choice(cldr.countries()), rng.choice(("duration-day", "duration-week", "duration-month"))
    value = rng.randint(2, 40)
    return (
        f"{country.english}: the trip lasts {cldr.amount(value, unit, 'en')}.",
        f"{country.french} : le voyage dure {cldr.amount(value, unit, 'fr')}.",
    )


FRAMES: tuple[Callable[[random.Random], Pair], ...] = (
    _quantity,
    _cost,
    _event,
    _departure,
    _opening_hours,
    _closed,
    _exhibition,
    _country_list,
    _speech,
    _trip,
)


def make(rng: random.Random) -> Example:
    """Draws one sentence pair."""
    english, french = rng.choice(FRAMES)(rng)
    return Example(PREFIX + english, french, key=english.lower())


@functools.cache
def examples() -> dict[str, tuple[Example, ...]]:
    """Returns the examples by split; no English sentence occurs twice."""
    return deal(make, SIZES, "embedded_translation")
