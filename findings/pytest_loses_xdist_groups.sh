#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0, the newest of both: `--dist=loadgroup` no longer keeps the tests
# of one `xdist_group` on one worker. No warning is given. With pytest 9.1.1 their names end in `@GROUP`
# and one worker runs them all; with 9.2.0 the names have no such end, and the tests are dealt out one
# by one, so that a module's fixture, a trained model for one, is made again on every worker. Reported
# as pytest-xdist's issue 1386 of pytest's development version; it has since been released.
#
# Seen with Python 3.11:
#   pytest 9.1.1: 6 of 6 named @shared, on 1 worker(s)
#   pytest 9.2.0: 0 of 6 named @shared, on 2 worker(s)
#
# Needs Python 3.11 or newer and pip. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_shared.py" <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group("shared")
@pytest.mark.parametrize("i", range(6))
def test_something(i):
    time.sleep(0.5)  # long enough for a second worker to take some
PYTHON
python3 -m venv "$folder/venv"
for version in 9.1.1 9.2.0; do
  "$folder/venv/bin/pip" install -q "pytest==$version" "pytest-xdist==3.8.0"
  (cd "$folder" && venv/bin/python -m pytest -v -n 2 --dist=loadgroup test_shared.py) \
    | grep PASSED > "$folder/passed"
  named=$(grep -c '@shared' "$folder/passed" || true)
  workers=$(grep -o '^\[gw[0-9]*\]' "$folder/passed" | sort -u | wc -l)
  echo "pytest $version: $named of $(wc -l < "$folder/passed") named @shared, on $workers worker(s)"
done | tee "$folder/output"
diff "$folder/output" - <<'EXPECTED'
pytest 9.1.1: 6 of 6 named @shared, on 1 worker(s)
pytest 9.2.0: 0 of 6 named @shared, on 2 worker(s)
EXPECTED
