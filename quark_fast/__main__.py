"""``python -m quark_fast``: which commands there are."""

import sys

COMMANDS = """\
usage: python -m quark_fast.COMMAND ...; each has --help

  train      unlearn a property: settings in, a run folder with report and model out
  generate   text of a finished run, before and after
  evaluate   runs, models and earlier tables side by side
  ablate     a small grid of runs, one table and one plot
  report     a run's report.html again, from its files\
"""

if __name__ == "__main__":
    print(COMMANDS)
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
