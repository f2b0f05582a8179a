"""Prints the table of docs/serving.md from build/serving/results.jsonl."""

import json

from environments import ENVIRONMENTS, FOLDER

HEAD = ("server", "adapter", "rank", "equal tokens", "largest difference")


def main():
    results = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    order = list(ENVIRONMENTS)
    print("|", " | ".join(HEAD), "|")
    print("|", " | ".join("---" for _ in HEAD), "|")
    for row in sorted(results, key=lambda row: order.index(row["environment"])):
        server = f"{row['server']} {row['version']}"
        equal, difference = f"{row['equal']} of {row['tokens']}", f"{row['difference']:.0e}"
        print("|", " | ".join((server, row["adapter"], str(row["rank"]), equal, difference)), "|")
    print()
    for environment in order:
        commands = [row["command"] for row in results if row["environment"] == environment]
        print(f"{environment}: {commands[0]}" if commands else f"{environment}: not run")


if __name__ == "__main__":
    main()
