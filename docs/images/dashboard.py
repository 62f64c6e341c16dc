"""Makes docs/images/dashboard.png, the screenshot of TensorBoard in the README, of two short runs on Penn Treebank.

python docs/images/dashboard.py RUNS
    Make the picture from the two runs in the directory RUNS. Needs Chromium (Debian: apt-get install chromium).
python -m docs.images.settings dashboard.png
    Then record the settings that the picture shows.

Make the two runs with this command, first with none and then with multi-horizon in place of S:
python scripts/train_lm.py --dataset ptb --max-tokens 200000 --eval-every 400 --eval-tokens 20000 \\
    --fidelity-every 47 --synthesizer S --run-dir RUNS/S
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if __package__:
    from docs.images.browser import Browser, find_chromium, tensorboard
else:
    from browser import Browser, find_chromium, tensorboard

OUTPUT = Path(__file__).with_name("dashboard.png").absolute()


def main(logdir: Path) -> int:
    """Takes the picture and returns the exit status."""
    chromium = find_chromium()
    if chromium is None:
        print("no Chromium here (Debian: apt-get install chromium)", file=sys.stderr)
        return 2
    os.chdir(logdir.parent)  # TensorBoard shows the path as given, so give a short one
    with tensorboard(Path(logdir.name)) as address, Browser(chromium, (1440, 1500)) as page:
        page.open(f"{address}?darkMode=false&smoothing=0#custom_scalars&_smoothingWeight=0")
        cards = "findAll('tf-custom-scalar-multi-line-chart-card')"
        page.wait(f"{cards}.length && {cards}.every(card => findAll('path.line', card.shadowRoot).length)")
        time.sleep(3)  # the lines of the charts move until they reach their places
        page.screenshot(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
