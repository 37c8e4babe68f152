#!/usr/bin/env bash
# Builds ffcv from source into the virtual environment with a small part of OpenCV.
#
# Needs these Debian packages (or their like): libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++
# ffcv asks pkg-config for `opencv4` and includes every OpenCV header that opencv_modules.hpp promises, which would mean
# more than 400 packages. It uses core and imgproc alone, so it is told of these two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-.venv/bin/python}"

for program in pkg-config g++; do
    command -v "$program" >/dev/null || { echo "error: $program is missing (Debian package: $program)" >&2; exit 1; }
done
header=opencv4/opencv2/imgproc.hpp
[ -e "/usr/include/$header" ] || [ -e "/usr/local/include/$header" ] || {
    echo "error: OpenCV's headers are missing (Debian packages: libopencv-core-dev libopencv-imgproc-dev)" >&2; exit 1; }
pkg-config --exists libturbojpeg || {
    echo "error: libturbojpeg's headers are missing (Debian package: libturbojpeg0-dev)" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/include/opencv2"
printf '#define HAVE_OPENCV_CORE\n#define HAVE_OPENCV_IMGPROC\n' >"$work/include/opencv2/opencv_modules.hpp"
cat >"$work/opencv4.pc" <<'PC'
Name: OpenCV
Description: core and imgproc
Version: 4
Libs: -L/usr/local/lib -lopencv_core -lopencv_imgproc
Cflags: -I${pcfiledir}/include -I/usr/include/opencv4 -I/usr/local/include/opencv4
PC
export PKG_CONFIG_PATH="$work${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
"$python" -m uv pip install --python "$python" -c constraints.txt --no-binary ffcv -e '.[all,dev,ffcv]'
"$python" -c 'import ffcv' 2>/dev/null && echo "ffcv is installed"
