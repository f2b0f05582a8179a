"""Prints the table of docs/serving.md, and each result, from build/serving/results.jsonl."""

import json

from environments import ENVIRONMENTS, FOLDER


def row(*cells):
    print("|", " | ".join(cells), "|")


def difference(results):
    return f"{max(result['difference'] for result in results):.0e}"


def main():
    results = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    by_environment = {name: [line for line in results if line["environment"] == name] for name in ENVIRONMENTS}
    row("server", "adapters", "equal tokens", "largest difference", "of the base alone")
    row(*["---"] * 5)
    for lines in filter(None, by_environment.values()):
        server, adapters = f"{lines[0]['server']} {lines[0]['version']}", str(len(lines))
        equal = f"{sum(line['equal'] for line in lines)} of {sum(line['tokens'] for line in lines)}"
        bases = [line["base"] for line in lines if line["base"] is not None]
        row(server, adapters, equal, difference(lines), difference(bases) if bases else "")
    for name, lines in by_environment.items():
        print(f"\n{name}: {lines[0]['command'] if lines else 'not run'}")
        for line in lines:
            print(f"  {line['adapter']}: {line['equal']} of {line['tokens']} equal, {line['difference']:.1e}")


if __name__ == "__main__":
    main()
