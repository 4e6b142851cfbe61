"""What scenes show: things that questions name, in three drawings each, and what is behind them."""

from __future__ import annotations


STYLES = ("fluent", "noto", "twemoji")
KINDS = ("animal", "food", "vehicle", "thing")
_CODES = {  # the emoji of each thing, as hexadecimal code points
    "animal": (
        "dog 1f436, cat 1f431, cow 1f42e, pig 1f437, horse 1f434, rabbit 1f430, bear 1f43b, lion 1f981, tiger 1f42f, "
        "fox 1f98a, frog 1f438, monkey 1f435, elephant 1f418, giraffe 1f992, penguin 1f427, duck 1f986, owl 1f989, "
        "turtle 1f422, snake 1f40d, whale 1f433, octopus 1f419, bee 1f41d, butterfly 1f98b, snail 1f40c, crab 1f980"
    ),
    "food": (
        "apple 1f34e, banana 1f34c, pear 1f350, orange 1f34a, lemon 1f34b, strawberry 1f353, "
        "pineapple 1f34d, watermelon 1f349, carrot 1f955, corn 1f33d, mushroom 1f344, pizza 1f355, cake 1f370, "
        "bread 1f35e, cheese 1f9c0, sandwich 1f96a, cookie 1f36a"
    ),
    "vehicle": (
        "car 1f697, bus 1f68c, truck 1f69a, train 1f682, tractor 1f69c, bicycle 1f6b2, plane 2708-fe0f, rocket 1f680, "
        "helicopter 1f681, boat 26f5"
    ),
    "thing": (
        "key 1f511, hammer 1f528, umbrella 2614, clock 23f0, book 1f4d5, guitar 1f3b8, drum 1f941, bell 1f514, "
        "balloon 1f388, ball 26bd, chair 1fa91, shoe 1f45f, crown 1f451"
    ),
}
CODES = {name: code for row in _CODES.values() for name, code in (entry.split() for entry in row.split(", "))}
KIND_OF = {entry.split()[0]: kind for kind, row in _CODES.items() for entry in row.split(", ")}
CONCEPTS = tuple(CODES)

PHOTOS = {  # photo: the word for what it shows
    "brick": "bricks",
    "china": "temple",
    "coffee": "table",
    "flower": "garden",
    "grass": "grass",
    "gravel": "stones",
    "hubble_deep_field": "stars",
    "motorcycle_left": "garage",
    "moon": "moon",
}
WALLS = {  # plain walls by the word for their colour: hue, saturation and value, each from, to
    "red": ((0.97, 1.03), (0.7, 0.95), (0.5, 0.85)),
    "yellow": ((0.13, 0.17), (0.6, 0.9), (0.75, 0.95)),
    "green": ((0.28, 0.4), (0.5, 0.85), (0.35, 0.7)),
    "blue": ((0.58, 0.66), (0.6, 0.9), (0.4, 0.85)),
    "purple": ((0.76, 0.82), (0.45, 0.8), (0.4, 0.75)),
    "white": ((0.0, 1.0), (0.0, 0.06), (0.85, 0.98)),
}
BACKGROUNDS = (*PHOTOS.values(), *WALLS)
OUTDOORS = ("bricks", "temple", "garden", "grass", "stones", "stars", "moon")
PIECES = ("page", "text", "coins", "cell", "immunohistochemistry")  # photos that clutter is cut from
LABELS = (*CONCEPTS, *BACKGROUNDS, "clutter")  # what a patch may show, by number


def withheld_style(name: str) -> str | None:
    """The drawing of a concept that no training scene shows: one of the three, for every third concept."""
    number = CONCEPTS.index(name)
    return STYLES[number // 3 % 3] if number % 3 == 0 else None


def with_article(name: str) -> str:
    if name in ("bricks", "stones", "stars", "grass"):
        return name
    if name == "moon":
        return "the moon"
    return ("an " if name[0] in "aeiou" else "a ") + name


def background_phrase(word: str) -> str:
    """How an answer names what is behind the things."""
    return f"a {word} wall" if word in WALLS else with_article(word)
