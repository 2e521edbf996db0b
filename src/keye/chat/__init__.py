"""Messages to a prompt, and a reply to its parts: answer, reasoning, calls of tools, times and places.

Knows the chat format and nothing of media, tokens or models: a medium is a placeholder that others fill in. Text that a
user wrote stays apart from the template's own, so that a special token typed by a user is never one.
"""

from keye.chat.foreign_template import CheckpointTemplate, find_template, load_template
from keye.chat.grounding import Region, parse_regions
from keye.chat.messages import (
    IMAGE_OPTIONS,
    VIDEO_OPTIONS,
    Medium,
    MediumKind,
    Message,
    Role,
    ToolCall,
    normalize,
    normalize_tools,
)
from keye.chat.replies import Reply, parse_reply
from keye.chat.stream import ReplyPiece, ReplyStream, joined_reply
from keye.chat.template import (
    CHATML,
    PREVIEW_CHATML,
    ChatTemplate,
    Segment,
    count_marks,
    opens_reasoning,
    render,
    template_of,
    without_last_end,
)
from keye.chat.times import Interval, format_seconds, merge_intervals, parse_intervals, to_seconds

__all__ = [
    "CHATML",
    "IMAGE_OPTIONS",
    "PREVIEW_CHATML",
    "VIDEO_OPTIONS",
    "ChatTemplate",
    "CheckpointTemplate",
    "Interval",
    "Medium",
    "MediumKind",
    "Message",
    "Region",
    "Reply",
    "ReplyPiece",
    "ReplyStream",
    "Role",
    "Segment",
    "ToolCall",
    "count_marks",
    "find_template",
    "format_seconds",
    "joined_reply",
    "load_template",
    "merge_intervals",
    "normalize",
    "normalize_tools",
    "opens_reasoning",
    "parse_intervals",
    "parse_regions",
    "parse_reply",
    "render",
    "template_of",
    "to_seconds",
    "without_last_end",
]
