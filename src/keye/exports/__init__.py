"""Moments as files for editing programs and for reading, exact to the frame.

Knows ranges of time and how videos are named; decodes nothing. `FORMATS` lists what can be written.
"""

from __future__ import annotations

from keye.exports.ranges import ExportOptions as ExportOptions
from keye.exports.ranges import ExportRange as ExportRange
from keye.exports.ranges import MediaReference as MediaReference
from keye.exports.ranges import ranges_of as ranges_of
from keye.exports.write import FORMATS as FORMATS
from keye.exports.write import Export as Export
from keye.exports.write import check_export as check_export
from keye.exports.write import describe_formats as describe_formats
from keye.exports.write import export_moments as export_moments
from keye.exports.write import find_format as find_format
from keye.exports.write import render as render
