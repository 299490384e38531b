#!/usr/bin/env bash
# Build sdist and wheel, install each in a clean environment, run a user's program there, and check its types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf dist
"$python" -m venv "$work/build"
"$work/build/bin/pip" install -qq --disable-pip-version-check build twine
"$work/build/bin/python" -m build --outdir dist . > "$work/build.log" || { cat "$work/build.log"; exit 1; }
"$work/build/bin/twine" check --strict dist/*
for file in dist/*.whl dist/*.tar.gz; do
    echo "== $file"
    rm -rf "$work/user"
    "$python" -m venv "$work/user"
    "$work/user/bin/pip" install -qq --disable-pip-version-check -c constraints.txt "$file"
    cp tools/user_program.py "$work/program.py"
    (cd "$work" && user/bin/python program.py && user/bin/python -c "import hypergrad; hypergrad.show_versions()")
    (cd "$work" && user/bin/python - << 'END'
from importlib.metadata import metadata
from pathlib import Path

import hypergrad

about = metadata("torch-hypergrad")
assert about["Version"] == hypergrad.__version__
assert about["License-Expression"] == "MIT" and "LICENSE" in about["License-File"]
assert (Path(hypergrad.__file__).parent / "py.typed").exists()
assert "## NotConverged" in (Path(hypergrad.__file__).parent / "warnings.md").read_text()  # which warnings refer to
END
    )
done
"$work/user/bin/pip" install -qq --disable-pip-version-check mypy 'pyright[nodejs]'
cd "$work"
user/bin/mypy --strict --follow-imports=silent --warn-unused-ignores program.py
user/bin/pyright --pythonpath user/bin/python program.py
