"""Stand-ins for the official utilities: existing scripts run with one changed import.

`keye.compat.utils_preview` is keye-vl-utils 1.0.0 (Keye-VL-8B-Preview), `keye.compat.utils_1_5` is keye-vl-utils 1.5.2
(Keye-VL-1.5); `keye.compat.processor` is what a checkpoint's own processor does with their results, short of the
tokenizer. Frames come from our decoder: right timestamps in any format, no decord, torchvision or OpenCV.
"""
