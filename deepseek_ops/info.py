"""`python -m deepseek_ops.info`: print what is installed and what is missing (`--json` for machines)."""

import json
import sys

from deepseek_ops._build_info import info, report

if __name__ == "__main__":
    print(json.dumps(info(), indent=2) if "--json" in sys.argv[1:] else report())
