"""Results files: reported as Markdown with pictures, compared, judged, and put into the README.

results.py reads them, and is the one place that says what a win is, a loss, or nothing at all;
targets.py has what was set out for, verdicts.py judges that, shortfalls.py says why one is missed.
"""

from .compare import compare as compare
from .compare import main_compare as main_compare
from .markdown import main_report as main_report
from .markdown import report as report
from .readme import main_readme as main_readme
from .readme import readme_table as readme_table
from .readme import update_readme as update_readme
from .results import Results as Results
from .results import read as read
from .shortfalls import main_targets as main_targets
