"""The table of every case: what is expected, and what is got."""

import sys
import unittest

from tests.cases import areas, rows


def main() -> int:
    wrong = 0
    print("| case | given | expected | got | |\n|---|---|---|---|---|")
    for area in areas():
        try:
            for row in rows(area):
                equal = row.got == row.expected
                wrong += not equal
                given = " ".join(row.given.split()).replace("|", "\\|")[:70]
                print(
                    f"| {row.case} | `{given}` | {row.expected} | {row.got} | {'' if equal else '**differs**'} |"
                )
        except unittest.SkipTest as reason:
            print(f"| {area} | | | | skipped: {reason} |")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
