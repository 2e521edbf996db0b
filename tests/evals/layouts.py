"""Tiny folders in the layouts in which benchmarks are published, and replies with the scores that they must have."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\x06\0\0\0\x1f\x15\xc4\x89\0\0\0\nIDATx\x9cc\0\1\0\0\5\0\1\r\n-\xb4"
    b"\0\0\0\0IEND\xaeB`\x82"
)
PICTURE = {"bytes": PNG, "path": "1.png"}


@dataclass(frozen=True)
class Layout:
    """One table of a task; for each question replies with their scores, and the headline of all first replies."""

    task: str
    table: str
    rows: list[dict[str, Any]]
    replies: list[list[tuple[str, float]]]
    headline: float


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_table(path: Path, rows):
    """Rows in the format that the name says: parquet, TSV, JSON, or JSON lines (also for BFCL's `.json`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_parquet(path, rows)
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl" or path.name.startswith("BFCL"):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1))


def write_video(path):
    """A file of the right name; tasks do not open media."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")


VIDEO_MME = {
    "videoID": "v1", "question_id": "001-1", "duration": "short", "domain": "Knowledge", "sub_category": "Law",
    "task_type": "OCR", "question": "What?", "options": ["A. red", "B. blue", "C. green", "D. grey"], "answer": "C",
}  # fmt: skip
LONG = {
    "id": "x_0", "video_id": "x", "video_path": "x.mp4", "subtitle_path": "x_en.json", "question": "Who?",
    "candidates": ["a cat", "a dog"], "correct_choice": 1, "duration_group": 15, "question_category": "S2E",
    "duration": 12.0, "starting_timestamp_for_subtitles": 0,
}  # fmt: skip
MLVU = {"video_name": "needle_1.mp4", "question": "What?\n(A) red\n(B) blue\n(C) green\n(D) grey", "answer": "B"}
MMMU = {"question": "See <image 1>. Which?", "options": "['one', 'two']", "answer": "B", "image_1": PICTURE}
WEMATH = {"option": "A. 3; B. 4; C. 5", "question": "How long?", "answer": "B", "image_path": PICTURE}
HALLUSION = {"category": "VD", "subcategory": "map", "set_id": "0", "question": "Is it?", "image": PICTURE}
OCR = {"question": "Read.", "dataset": "x", "question_type": "Doc-oriented VQA", "image": PICTURE}
EIGHT = "\n".join(f"{letter}. option {letter.lower()}" for letter in "ABCDEFGH")


def _wemath(name, right):
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    return [{**WEMATH, "ID": name, "key": key} for key in keys], [[("B" if hit else "C", float(hit))] for hit in right]


_MASTERED, _MASTERED_REPLIES = _wemath("p1", (True, True, True))
_HALF, _HALF_REPLIES = _wemath("p2", (True, True, False))

LAYOUTS = [
    Layout(
        "timelens_qvhighlights", "data/qvhighlights-00000-of-00001.parquet",
        [{"video_path": "v.mp4", "query": "he runs", "span": [[10.0, 20.0]]}],
        [[("The event happens in 10.0 - 15.0 seconds.", 0.5), ("从10秒到20秒", 1.0), ("I do not know", 0.0),
          ("<think>1.0 - 2.0?</think>10.0 - 20.0 seconds", 1.0)]],
        50.0,
    ),
    Layout(
        "extremewhenbench", "data/test-00000-of-00001.parquet",
        [{"qid": 1, "video_id": "v", "source_corpus": "LVBench", "question": "When?",
          "correct_interval": [3600.0, 3700.0], "video_duration_s": 5000.0}],
        [[("1:00:00 - 1:01:40", 1.0), ("", 0.0)]],
        100.0,
    ),
    Layout("videomme", "videomme/test-00000-of-00001.parquet", [VIDEO_MME], [[("(C)", 1.0), ("A or C", 0.0)]], 100.0),
    Layout(
        "videomme", "Video-MME.tsv",
        [{**{name: value for name, value in VIDEO_MME.items() if name != "options"},
          "candidates": "['A. red', 'B. blue', 'C. green', 'D. grey']"}],
        [[("green", 1.0)]], 100.0,
    ),
    Layout("longvideobench_v", "lvb_val.json", [LONG], [[("The answer is B.", 1.0), ("C", 0.0)]], 100.0),
    Layout(
        "longvideobench_v", "data/validation-00000-of-00001.parquet",
        [{**{name: value for name, value in LONG.items() if name != "candidates"}, "option0": "a cat",
          "option1": "a dog", "option2": "N/A", "option3": "N/A", "option4": "N/A"}],
        [[("B", 1.0)]], 100.0,
    ),
    Layout(
        "mlvu_dev", "mlvu/test-00000-of-00001.parquet",
        [{**MLVU, "task_type": "count"}, {**MLVU, "task_type": "count"}, {**MLVU, "task_type": "order"}],
        [[("B", 1.0)], [("C", 0.0)], [("(B) blue", 1.0)]],
        75.0,
    ),
    Layout(
        "mlvu_dev", "MLVU/json/1_plotQA.json",
        [{"video": "a.mp4", "question": "What?", "candidates": ["red", "blue"], "answer": "blue",
          "question_type": "plotQA"}],
        [[("B", 1.0), ("A", 0.0)]], 100.0,
    ),
    Layout(
        "mlvu_test", "test-00000-of-00001.parquet",
        [{**MLVU, "question": MLVU["question"] + "\n(E) black\n(F) white", "answer": "F", "task_type": "ego"}],
        [[("F", 1.0), ("B", 0.0)]], 100.0,
    ),
    Layout(
        "mmmu", "Art_Theory/validation-00000-of-00001.parquet",
        [{**MMMU, "id": "validation_Art_Theory_1", "question_type": "multiple-choice"},
         {**MMMU, "id": "validation_Math_2", "question_type": "open", "options": "[]", "answer": "['0.5', '1/2']"},
         {**MMMU, "id": "validation_Math_3", "question_type": "open", "options": "[]", "answer": "12"}],
        [[("B", 1.0), ("", 0.0)], [("The answer is 0.5", 1.0), ("", 0.0), ("2", 0.0)], [("\\boxed{12}", 1.0)]],
        100.0,
    ),
    Layout(
        "videommmu", "Adaptation/test-00000-of-00001.parquet",
        [{"id": "validation_Pharmacy_7", "question": "Which?", "options": ["left", "right"], "answer": "A",
          "question_type": "multiple-choice"}],
        [[("A. left", 1.0)]], 100.0,
    ),
    Layout(
        "mmvu", "validation.json",
        [{"id": "v_0", "question": "Which?", "question_type": "multiple-choice", "answer": "E", "choices":
          {"A": "one", "B": "two", "C": "three", "D": "four", "E": "five"}, "video_path": "videos/Art/1.mp4"},
         {"id": "v_1", "question": "How?", "question_type": "open-ended", "answer": "O(n)", "choices": {"A": ""},
          "video_path": "videos/Law/2.mp4"}],
        [[("E", 1.0), ("a", 0.0)], [("O(n)", 1.0), ("", 0.0), ("not O(n)", 0.0)]],
        100.0,
    ),
    Layout(
        "tempcompass_multi_choice", "multi-choice/test-00000-of-00001.parquet",
        [{"video_id": "1", "question": "What?\nA. up\nB. down", "answer": "B. down", "dim": "direction"}],
        [[("B", 1.0), ("up", 0.0)]], 100.0,
    ),
    Layout(
        "tempcompass_yes_no", "yes_no/test-00000-of-00001.parquet",
        [{"video_id": "1", "question": "Is it?", "answer": "yes", "dim": "speed"}],
        [[("Yes, it is.", 1.0), ("No", 0.0), ("Perhaps", 0.0)]], 100.0,
    ),
    Layout(
        "tempcompass_caption_matching", "caption_matching/test-00000-of-00001.parquet",
        [{"video_id": "1", "question": "Which?\nSentence A: it rolls left\nSentence B: it rolls right",
          "answer": "Sentence A: it rolls left", "dim": "direction"},
         {"video_id": "1", "question": "Which?\nOption 1: it rolls left\nOption 2: it rolls right",
          "answer": "Option 2: it rolls right", "dim": "direction"}],
        [[("Sentence A", 1.0), ("Sentence B: it rolls right", 0.0), ("It rolls left.", 1.0)],
         [("Option 2", 1.0), ("1", 0.0)]],
        100.0,
    ),
    Layout(
        "kcmmbench_spu", "subsets/SPU.tsv",
        [{"index": 0, "question": "是同款吗", "answer": "是", "image_path": "['images/a.jpg', 'images/b.jpg']"}],
        [[("是。", 1.0), ("否，因为", 0.0), ("Yes", 1.0)]], 100.0,
    ),
    Layout(
        "kcmmbench_video_topic", "subsets/Video_Topic.tsv",
        [{"index": 0, "question": "哪些", "answer": "是_否_是", "image_path": "['images/a.jpg']"}],
        [[("[是, 否, 是]", 1.0), ("[不是,否,是]", 0.0), ("[]", 0.0), ("[是,\n否,是]", 1.0)]], 100.0,
    ),
    Layout(
        "kcmmbench_cpv", "subsets/CPV.tsv",
        [{"index": 0, "question": "颜色", "answer": "红色", "image_path": "['images/a.jpg']"}],
        [[("红色", 1.0), ("蓝色", 0.0)]], 100.0,
    ),
    Layout(
        "mmstar", "mmstar.parquet",
        [{"index": 0, "question": "What?\nOptions: A: red, B: blue, C: green, D: grey", "image": PNG, "answer": "A",
          "category": "x", "l2_category": sub} for sub in ("one", "one", "two")],
        [[("A", 1.0)], [("B", 0.0)], [("red", 1.0)]],
        75.0,
    ),
    Layout(
        "ai2d", "data/test-00000-of-00001.parquet",
        [{"question": "What?", "image": PICTURE, "options": ["moon", "sun"], "answer": "1"}],
        [[("B", 1.0), ("moon", 0.0)]], 100.0,
    ),
    Layout(
        "realworldqa", "data/test-00000-of-00001.parquet",
        [{"question": "Where?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option.",
          "image": PICTURE, "answer": "B"}, {"question": "How many?", "image": PICTURE, "answer": "2"}],
        [[("Right", 1.0), ("A", 0.0)], [("Two", 1.0), ("3", 0.0)]],
        100.0,
    ),
    Layout(
        "mmbench", "en/dev-00000-of-00001.parquet",
        [{"index": index, "question": "What?", "hint": "nan", "A": "red", "B": "blue", "C": "nan", "D": "nan",
          "answer": "A", "category": "color", "L2-category": "x", "image": PICTURE} for index in (1, 1_000_001, 2)],
        [[("A", 1.0)], [("B", 0.0)], [("A", 1.0)]],
        50.0,
    ),
    Layout(
        "mathvista", "data/testmini-00000-of-00001.parquet",
        [{"pid": "1", "question": "Which?", "question_type": "multi_choice", "answer_type": "text", "precision": None,
          "choices": ["short", "long"], "answer": "long", "decoded_image": PICTURE},
         {"pid": "2", "question": "How many?", "question_type": "free_form", "answer_type": "integer",
          "precision": None, "choices": None, "answer": "0", "decoded_image": PICTURE},
         {"pid": "3", "question": "How long?", "question_type": "free_form", "answer_type": "float", "precision": 1.0,
          "choices": None, "answer": "1.2", "decoded_image": PICTURE},
         {"pid": "4", "question": "Which?", "question_type": "free_form", "answer_type": "list", "precision": None,
          "choices": None, "answer": "[1, 2]", "decoded_image": PICTURE}],
        [[("B", 1.0), ("short", 0.0)], [("The answer is 0.", 1.0), ("", 0.0)], [("1.22", 1.0), ("1.4", 0.0)],
         [("[1, 2]", 1.0), ("[2, 1]", 0.0)]],
        100.0,
    ),
    Layout(
        "mathverse", "testmini.json",
        [{"sample_index": "1", "problem_version": "Text Dominant", "question": "Find x.\nChoices:\nA:145°\nB:35°",
          "image": "images/1.png", "answer": "A", "question_type": "multi-choice"},
         {"sample_index": "2", "problem_version": "Text Only", "question": "Find y.", "image": "",
          "answer": "2\\sqrt{3}", "question_type": "free-form"}],
        [[("\\boxed{A}", 1.0), ("35°", 0.0)], [("\\boxed{2\\sqrt{3}}", 1.0), ("", 0.0)]],
        100.0,
    ),
    Layout(
        "mathvision", "data/test-00000-of-00001.parquet",
        [{"id": "1", "question": "How many?", "options": [], "image": "images/1.jpg", "decoded_image": PICTURE,
          "answer": "7", "level": 1, "subject": "counting"}],
        [[("\\boxed{7}", 1.0), ("8", 0.0)]], 100.0,
    ),
    Layout(
        "logicvista", "data/test-00000-of-00001.parquet",
        [{"question": "Which?", "image": PICTURE, "answer": "C"},
         {"question": "Which?", "image": PICTURE, "answer": "B, C"}],
        [[("C", 1.0), ("D", 0.0)], [("B and C", 1.0), ("B", 0.0)]],
        100.0,
    ),
    Layout("wemath", "testmini.parquet", [*_MASTERED, *_HALF], [*_MASTERED_REPLIES, *_HALF_REPLIES], 75.0),
    Layout(
        "ocrbench", "data/test-00000-of-00001.parquet",
        [{**OCR, "answer": ["Centre"]},
         {**OCR, "answer": ["a"]}],
        [[("It says CENTRE.", 1.0), ("", 0.0)], [("a", 1.0), ("banana", 0.0)]],
        100.0,
    ),
    Layout(
        "chartqa", "data/test-00000-of-00001.parquet",
        [{"type": "human_test", "question": "How much?", "answer": "100", "image": PICTURE}],
        [[("104", 1.0), ("106", 0.0), ("", 0.0)]], 100.0,
    ),
    Layout(
        "countbench", "data/test-00000-of-00001.parquet",
        [{"question": "How many?", "number": 3, "image": PICTURE}], [[("three", 1.0), ("13", 0.0)]], 100.0,
    ),
    Layout(
        "hallusionbench", "data/image-00000-of-00001.parquet",
        [{**HALLUSION, "figure_id": figure, "question_id": question, "gt_answer": gold}
         for figure, question, gold in (("0", "0", "1"), ("0", "1", "0"), ("1", "0", "0"), ("1", "1", "0"))],
        [[("Yes", 1.0), ("Eyes are visible", 0.0)], [("No", 1.0)], [("Yes.", 0.0)], [("no", 1.0)]],
        100 * (3 / 4 + 1 / 2 + 1 / 2) / 3,
    ),
    Layout(
        "bfcl", "BFCL_v4_multiple.json",
        [{"id": "multiple_0", "question": [[{"role": "user", "content": "Area?"}]], "function": [{"name": "geo.area"}],
          "possible_answer": [{"geo.area": {"base": [3], "unit": ["cm", ""]}}]}],
        [[("[geo.area(base=3)]", 1.0), ('{"name": "geo_area", "arguments": {"base": 3, "unit": "cm"}}', 1.0),
          ("[geo.area(base=4)]", 0.0), ("[geo.area(base=3, side=1)]", 0.0), ("three", 0.0)]],
        100.0,
    ),
]  # fmt: skip
