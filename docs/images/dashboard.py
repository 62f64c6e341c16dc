"""Makes docs/images/dashboard.png, the screenshot of TensorBoard in the README, of two short runs on Penn Treebank.

python docs/images/dashboard.py RUNS
    RUNS holds the runs, as this command makes them; needs Chromium (Debian: apt-get install chromium).
python -m docs.images.settings dashboard.png
    Records the settings that the picture shows.

python scripts/train_lm.py --dataset ptb --max-tokens 200000 --eval-every 400 --eval-tokens 20000 \\
    --fidelity-every 47 --synthesizer S --run-dir RUNS/S        # for S of none and multi-horizon
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
    """Take the picture."""
    chromium = find_chromium()
    if chromium is None:
        print("no Chromium here (Debian: apt-get install chromium)", file=sys.stderr)
        return 2
    os.chdir(logdir.parent)  # the page shows the directory as it was given
    with tensorboard(Path(logdir.name)) as address, Browser(chromium, (1440, 1500)) as page:
        page.open(f"{address}?darkMode=false&smoothing=0#custom_scalars&_smoothingWeight=0")
        cards = "findAll('tf-custom-scalar-multi-line-chart-card')"
        page.wait(f"{cards}.length && {cards}.every(card => findAll('path.line', card.shadowRoot).length)")
        time.sleep(3)  # lines glide to their places
        page.screenshot(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
