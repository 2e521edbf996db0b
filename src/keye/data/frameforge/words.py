"""The language of FrameForge: names of what can be seen, rendered words, and the wording of every question.

Knows no scene and no pixels. Everything a question or an answer can say is made of the pieces of `vocabulary()`, of
numbers and times, and of the upper-case text that was rendered into the video.
"""

import re
from itertools import product

Rgb = tuple[int, int, int]
Pair = tuple[str, str]

COLORS: dict[str, Rgb] = {
    "red": (220, 30, 30), "green": (30, 190, 50), "blue": (50, 90, 245), "yellow": (240, 225, 40),
    "purple": (160, 50, 210), "cyan": (40, 220, 230), "orange": (245, 140, 20), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "big")
BACKGROUNDS: dict[str, Rgb] = {
    "black": (14, 14, 14), "gray": (110, 110, 110), "brown": (90, 58, 30), "navy": (16, 20, 82), "teal": (14, 84, 84),
}  # fmt: skip
DIRECTIONS = ("left", "right", "up", "down")
TEXT_COLORS: tuple[Rgb, ...] = ((240, 240, 240), (238, 228, 70), (125, 235, 242))
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    {
        ("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "triangle"), ("purple", "square"),
        ("cyan", "star"), ("orange", "circle"), ("white", "triangle"),
    }
)  # fmt: skip
ALL_PAIRS: tuple[Pair, ...] = tuple(product(COLORS, SHAPES))
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)

_HELD_OUT = (
    "BAT DAY FUN NET OIL PIG RAT TOY JOB VAN HAND MARK NOTE SING VASE CLUB FROG HERO WAVE PARK GIFT TEAM "
    "BRICK CLOUD HOUSE MUSIC PLANT QUICK STORM TIGER"
)
_TRAIN = (
    "CAT DOG SUN SKY CAR BUS MAP CUP HAT PEN BOX KEY TEA ICE OWL FOX BEE ANT JAM ZOO EGG LEG ARM EYE SEA BAY FAN GAS "
    "RUN TOP WIN YES NOW HOT RED GO STOP OPEN EXIT PLAY MOON STAR FISH BIRD TREE LAKE RAIN SNOW WIND FIRE GOLD KING "
    "ROAD SHIP TAXI JAZZ QUIZ VOTE WORK HOME LOVE KITE MILK CAKE BOOK DESK DOOR LION WOLF BEAR DUCK UP AXE BED COW "
    "DRY ELF FLY GUM HEN INK JET KID LIP MUD NUT PIE RUG SIX TWO USE VET WAX YAK ZIP BLUE CODE DARK FARM GAME HELP "
    "IDEA JUMP KNEE LAMP MAZE NEWS OVEN PATH ROSE SALT TENT UNIT VERB WEEK YARD ZERO APPLE BEACH CHAIR DREAM EARTH "
    "FLAME GRAPE HORSE JUICE KNIFE LEMON MOUSE NIGHT OCEAN PIZZA QUEEN RIVER SUGAR TABLE UNCLE VOICE WATER YOUTH "
    "ZEBRA"
)
HELD_OUT_WORDS: tuple[str, ...] = tuple(_HELD_OUT.split())
TRAIN_WORDS: tuple[str, ...] = tuple(_TRAIN.split())

# One entry a task, or a form of a task ("order.before"). {x} {a} {b}: a named object, {t}: a time, {w}: rendered text.
PHRASES: dict[str, tuple[str, ...]] = {
    "ground": ("when is the {x} visible?", "when can you see the {x}?", "at what times is the {x} shown?"),
    "ground_text": ("when is the word {w} shown?", "when is the text {w} visible?", "when can you read {w}?"),
    "start": (
        "when does the {x} first appear?", "at what time does the {x} first appear?", "when do you first see the {x}?",
    ),
    "end": ("when is the {x} last visible?", "when do you last see the {x}?", "at what time is the {x} last visible?"),
    "count": (
        "how many different objects are in the video?",
        "how many different objects appear in the video?",
        "count the objects in the whole video.",
    ),
    "count_at": (
        "how many objects are visible at {t}?", "how many objects do you see at {t}?", "count the objects at {t}.",
    ),
    "attribute_at.color": ("what color is the {x} at {t}?", "which color does the {x} have at {t}?"),
    "attribute_at.shape": ("what shape is the {x} object at {t}?", "which shape does the {x} object have at {t}?"),
    "list_at": ("what objects are visible at {t}?", "list the objects at {t}.", "describe the image at {t}."),
    "visible_at": ("is the {x} visible at {t}?", "can you see the {x} at {t}?", "at {t}, is the {x} shown?"),
    "order.first": ("which appears first, the {a} or the {b}?", "what do you see first, the {a} or the {b}?"),
    "order.before": ("does the {a} appear before the {b}?", "do you see the {a} before the {b}?"),
    "direction": ("which way does the {x} move?", "in which direction does the {x} move?"),
    "place.x": ("is the {x} on the left or on the right at {t}?", "at {t}, is the {x} in the left or right half?"),
    "place.y": ("is the {x} at the top or at the bottom at {t}?", "at {t}, is the {x} in the top or bottom half?"),
    "read": (
        "read the text.", "what does the text say?", "what text is shown in the video?", "which text can you read?",
    ),
    "presence": ("is there {x} in the video?", "can you see {x} in the video?", "does {x} appear in the video?"),
    "presence_text": (
        "is the word {w} shown in the video?", "can you read {w} in the video?",
        "does the word {w} appear in the video?",
    ),
    "color_change": ("what color does the {x} change to?", "which color does the {x} have after the change?"),
    "change_time": ("when does the {x} change color?", "at what time does the {x} change color?"),
    "times": ("how many times does the {x} appear?", "how often does the {x} appear?"),
    "size": ("what size is the {x}?", "is the {x} big or small?"),
    "background": ("what color is the background at {t}?", "which color does the background have at {t}?"),
    "cut_time": ("when does the background change?", "at what time does the scene change?"),
    "caption": ("describe the video.", "describe the video with times.", "what happens in the video, and when?"),
}  # fmt: skip
#: The same for single pictures; their words are among those above.
PICTURE_PHRASES: dict[str, tuple[str, ...]] = {
    "count": ("how many objects are in the image?", "count the objects in the image."),
    "list_at": ("what objects are in the image?", "list the objects.", "describe the image."),
    "background": ("what color is the background?", "which color does the background have?"),
    "read": ("read the text.", "what does the text say?", "which text can you read?"),
    "presence": ("is there {x} in the image?", "can you see {x} in the image?"),
    "size": ("what size is the {x}?", "is the {x} big or small?"),
    "attribute_at.color": ("what color is the {x}?", "which color does the {x} have?"),
    "attribute_at.shape": ("what shape is the {x} object?", "which shape does the {x} object have?"),
}
TIME_PHRASES = ("{:.1f} seconds", "{:.1f} seconds", "{:.1f} s")
ANSWER_WORDS = ("yes", "no", "none", "seconds", "moves", "changes", "to", "word", "top", "bottom", "a", "an", "s")
PUNCTUATION = ("?", ".", ",", ";", "[[", "]]", "], [", "[]")


def with_article(name: str) -> str:
    """`name` after its indefinite article: "a red circle", "an orange star"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def vocabulary() -> list[str]:
    """Every word and punctuation piece of questions and answers, without leading spaces, sorted, no duplicates.

    Not included: digits, times, and rendered text, which a tokenizer should spell by character so that unseen words can
    be read. In sentences a word follows one space, except at the start of a question or an answer.
    """
    pieces = set(ANSWER_WORDS) | set(PUNCTUATION)
    pieces.update(COLORS, SHAPES, SIZES, BACKGROUNDS, DIRECTIONS)
    for phrases in PHRASES.values():
        for phrase in phrases:
            pieces.update(re.findall(r"[a-z]+", re.sub(r"\{\w\}", " ", phrase)))
    return sorted(pieces)
