"""Questions about single pictures: the first frame of a clip, asked about without times.

The tasks are those of videos whose answer one frame holds, in wordings that speak of an image.
"""

import random

from keye.data.frameforge.questions import Question, absent_pairs, listing
from keye.data.frameforge.scene import Clip
from keye.data.frameforge.words import PICTURE_PHRASES, with_article


def picture_questions(clip: Clip, rng: random.Random, count: int) -> list[Question]:
    """Up to `count` different questions about the first frame of `clip`, in random order."""
    visible = clip.scene.visible_objects(0)
    chosen = [
        _ask(rng, "count", str(len(visible))),
        _ask(rng, "list_at", listing(clip, 0)),
        _ask(rng, "background", clip.scene.background_at(0).color),
    ]
    if clip.scene.text is not None and clip.scene.text.visible(0):
        chosen.append(_ask(rng, "read", clip.scene.text.content))
    for thing in visible:
        color, others = thing.color_at(0), [other for other in visible if other is not thing]
        name = f"{color} {thing.shape}"
        chosen.append(_ask(rng, "presence", "yes", x=with_article(name)))
        chosen.append(_ask(rng, "size", thing.size, x=name))
        if all(other.shape != thing.shape for other in others):
            chosen.append(_ask(rng, "attribute_at.color", color, x=thing.shape))
        if all(other.color_at(0) != color for other in others):
            chosen.append(_ask(rng, "attribute_at.shape", thing.shape, x=color))
    absent = absent_pairs(clip, rng, len(visible))
    chosen += [_ask(rng, "presence", "no", x=with_article(" ".join(pair))) for pair in absent]
    rng.shuffle(chosen)
    return list({question.text: question for question in chosen}.values())[:count]


def _ask(rng: random.Random, form: str, answer: str, **slots: str) -> Question:
    return Question(form.split(".")[0], rng.choice(PICTURE_PHRASES[form]).format(**slots), answer)
