"""FrameForge: seeded synthetic videos with exactly known answers, drawn fast enough to train on without storing them.

    clip = make_clip(7, frames=16)
    frames = render(clip)                       # uint8 RGB [16, 112, 112, 3]
    chosen = questions(clip, random.Random(7), 8)
    write_film(plan_film(7, minutes=30), "film.mp4")     # one to search in

Needs numpy and pillow, and PyAV to write files; never torch.
"""

from keye.data.frameforge.film import Film, FilmEvent, plan_film
from keye.data.frameforge.film_file import write_film
from keye.data.frameforge.labels import dense_labels
from keye.data.frameforge.questions import TASKS, Question, format_intervals, picture_questions, questions
from keye.data.frameforge.render import render
from keye.data.frameforge.scene import SPLITS, Clip, SceneObject, make_clip, stream
from keye.data.frameforge.traces import TRACED_TASKS, trace
from keye.data.frameforge.windows import FILM_SIZES, make_window, window_questions
from keye.data.frameforge.words import HELD_OUT_PAIRS, HELD_OUT_WORDS, TRAIN_WORDS, vocabulary
from keye.data.frameforge.writer import write_mp4

__all__ = [
    "FILM_SIZES", "HELD_OUT_PAIRS", "HELD_OUT_WORDS", "SPLITS", "TASKS", "TRACED_TASKS", "TRAIN_WORDS", "Clip", "Film",
    "FilmEvent", "Question", "SceneObject", "dense_labels", "format_intervals", "make_clip", "make_window",
    "picture_questions", "plan_film", "questions", "render", "stream", "trace", "vocabulary", "window_questions",
    "write_film", "write_mp4",
]  # fmt: skip
