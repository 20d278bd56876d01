"""Puzzles with several right answers: the given moves are replayed.

A function takes the answer and the problem's metadata, and is True if legal moves alone solve the puzzle. Boards may come
from data files: work is bounded by the length of the data, never by a number in it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

from megatron_ring.rl.reward.gym.readers import json_value, list_of

Metadata = Mapping[str, Any]

MAX_DISKS = 64
_HANOI = re.compile(r"Move disk (\d{1,3}) from Peg (\d{1,3}) to Peg (\d{1,3})", re.ASCII)
_POUR = re.compile(r"pour ([A-Z])->([A-Z])", re.ASCII)
_FILL = re.compile(r"(fill|empty) ([A-Z])", re.ASCII)
_BETWEEN = re.compile(r"→|->|\\(?:long)?(?:rightarrow|to)\b|[,\s$]")
_STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
_SHOVES = {"R": (0, 1), "D": (1, 0), "L": (0, -1), "U": (-1, 0)}


def cryptarithm(answer: str, metadata: Metadata) -> bool:
    """``A=1,B=2``: every letter once, no digit twice, and the sum is right."""
    pairs = [re.fullmatch(r"\s*(\w)\s*=\s*([0-9])\s*", pair) for pair in answer.split(",")]
    found = [(pair[1], pair[2]) for pair in pairs if pair is not None]
    digits = dict(found)
    words, result = metadata["words_letters"], metadata["result_letters"]
    letters = set("".join(words) + result)
    if len(found) != len(pairs) or len(digits) != len(found) or digits.keys() != letters:
        return False
    if len(set(digits.values())) != len(digits):
        return False
    if not metadata["allow_leading_zero"] and any(digits[word[0]] == "0" for word in (*words, result)):
        return False
    values = [int("".join(digits[letter] for letter in word)) for word in (*words, result)]
    return sum(values[:-1]) == values[-1]


def hanoi(answer: str, metadata: Metadata) -> bool:
    """One move a line, no more of them than the solution has."""
    disks, start, target = metadata["num_disks"], metadata["start_peg"], metadata["target_peg"]
    if not 0 < disks <= MAX_DISKS:
        raise ValueError(f"num_disks={disks} must be from 1 to {MAX_DISKS}")
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if len(lines) > metadata["solution_length"]:
        return False
    pegs: dict[int, list[int]] = {start: list(range(disks, 0, -1))}
    for line in lines:
        move = _HANOI.fullmatch(line)
        if move is None:
            return False
        disk, source, aim = map(int, move.groups())
        if not 1 <= aim <= metadata["num_pegs"] or not pegs.get(source) or pegs[source][-1] != disk:
            return False
        onto = pegs.setdefault(aim, [])
        if onto and onto[-1] <= disk:
            return False
        onto.append(pegs[source].pop())
    return len(pegs.get(target, ())) == disks


def jugs(answer: str, metadata: Metadata) -> bool:
    """A JSON list of ``fill A``, ``empty A`` and ``pour A->B`` that leaves the target in any jug."""
    capacities, target = metadata["puzzle"]["jug_capacities"], metadata["puzzle"]["target"]
    full = {chr(ord("A") + index): capacity for index, capacity in enumerate(capacities)}
    level = dict.fromkeys(full, 0)
    moves = list_of(answer, str)
    if not moves:
        return False
    for move in moves:
        words = " ".join(move.split())
        fill, pour = _FILL.fullmatch(words), _POUR.fullmatch(words)
        if fill is not None and fill[2] in full:
            level[fill[2]] = full[fill[2]] if fill[1] == "fill" else 0
        elif pour is not None and pour[1] in full and pour[2] in full and pour[1] != pour[2]:
            amount = min(level[pour[1]], full[pour[2]] - level[pour[2]])
            level[pour[1]] -= amount
            level[pour[2]] += amount
        else:
            return False
    return target in level.values()


def knight_swap(answer: str, metadata: Metadata) -> bool:
    """``No``, or a JSON list of ``colour,from,to`` that swaps all knights in as few moves as the solution."""
    if not metadata["is_possible"]:
        return answer.strip().lower() == "no"
    moves = list_of(answer, str)
    if moves is None or len(moves) > len(metadata["solution"]):
        return False
    before: dict[str, Any] = dict(metadata["pieces"])
    pieces, turn = dict(before), metadata["start_turn"]
    for move in moves:
        parts = [part.strip() for part in move.split(",")]
        if len(parts) != 3:
            return False
        colour, start, end = parts
        if colour != turn or pieces.get(start) != colour or end not in metadata["board"].get(start, ()):
            return False
        if pieces.get(end) is not None:
            return False
        pieces[end], pieces[start] = colour, None
        turn = "B" if turn == "w" else "w"
    swapped = {"w": "B", "B": "w"}
    return all(pieces.get(place) == swapped.get(colour or "") for place, colour in before.items())


def quantum_lock(answer: str, metadata: Metadata) -> bool:
    """Buttons in order, as few as the solution has, that reach the target."""
    path = metadata["solution_path"]
    presses = _BETWEEN.sub("", answer).upper()
    buttons = {button["name"]: button for button in metadata["buttons"]}
    if len(presses) != len(path) or not all(press in buttons for press in presses):
        return False
    state, colour = metadata["initial_value"], metadata["initial_state"]
    for press in presses:
        button = buttons[press]
        if button["active_state"] not in (colour, "any"):
            continue
        amount = button["value"]
        state = {"add": state + amount, "subtract": state - amount, "multiply": state * amount}[
            button["type"]
        ]
        colour = "green" if colour == "red" else "red"
    return state == metadata["target_value"]


def shortest_path(answer: str, metadata: Metadata) -> bool:
    """Directions from * to #, as few as the solution's, or ``infeasible`` where there is none."""
    matrix, solution = metadata["matrix"], metadata["solution"]
    words = answer.split()
    if not solution or solution == "infeasible":
        return words == ["infeasible"]
    if len(words) != len(solution):
        return False
    cells = {(r, c): cell for r, row in enumerate(matrix) for c, cell in enumerate(row)}
    r, c = next(place for place, cell in cells.items() if cell == "*")
    for word in words:
        step = _STEPS.get(word, (0, 0))
        r, c = r + step[0], c + step[1]
        if word not in _STEPS or cells.get((r, c), "X") == "X":
            return False
    return cells[r, c] == "#"


def sokoban(answer: str, metadata: Metadata) -> bool:
    """Letters of LDUR that push every box onto a goal; a step into a wall has no effect."""
    rows = [line.replace(" ", "") for line in metadata["gamestr"].splitlines() if line.strip()]
    cells = {(r, c): cell for r, row in enumerate(rows) for c, cell in enumerate(row)}
    floor = {place for place, cell in cells.items() if cell != "+"}
    goals = {place for place, cell in cells.items() if cell in "X$%"}
    boxes = {place for place, cell in cells.items() if cell in "@$"}
    r, c = next(place for place, cell in cells.items() if cell in "*%")
    for letter in answer.strip():
        if letter not in _SHOVES:
            return False
        dr, dc = _SHOVES[letter]
        ahead, beyond = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
        if ahead not in floor:
            continue
        if ahead in boxes:
            if beyond not in floor or beyond in boxes:
                continue
            boxes.remove(ahead)
            boxes.add(beyond)
        r, c = ahead
    return boxes <= goals


def word_ladder(answer: str, metadata: Metadata) -> bool:
    """Known words between commas, each one letter from the last, from the start to the end."""
    return (
        is_ladder(answer, metadata) and {word.strip() for word in answer.upper().split(",")} <= dictionary()
    )


def is_ladder(answer: str, metadata: Metadata) -> bool:
    """As :func:`word_ladder`, but the words need not be in the dictionary."""
    words = [word.strip() for word in answer.upper().split(",")]
    start, end = metadata["start_word"].upper(), metadata["end_word"].upper()
    if (
        len(words) < 2
        or (words[0], words[-1]) != (start, end)
        or any(len(word) != len(end) for word in words)
    ):
        return False
    steps = itertools.pairwise(words)
    return all(sum(a != b for a, b in zip(*step, strict=True)) == 1 for step in steps)


@functools.cache
def dictionary() -> frozenset[str]:
    """reasoning-gym's words of three to five letters."""
    from reasoning_gym.algorithmic.word_ladder import WordLadderDataset

    return frozenset().union(*WordLadderDataset._load_words_from_csv(3, 5).values())


def kakurasu(answer: list[list[int]], metadata: Metadata) -> bool:
    """Zeros and ones whose weights give the sums of every row and column."""
    rows, columns = metadata["row_sums"], metadata["col_sums"]
    if len(answer) != len(rows) or any(len(row) != len(columns) or not set(row) <= {0, 1} for row in answer):
        return False
    across = [sum(place * cell for place, cell in enumerate(row, 1)) for row in answer]
    down = [sum(place * row[c] for place, row in enumerate(answer, 1)) for c in range(len(columns))]
    return across == rows and down == columns


def partitions(answer: str, metadata: Metadata) -> bool:
    """All of the partitions, in any order, as lists of text."""
    given = json_value(answer)
    if not isinstance(given, list) or not all(isinstance(row, list) for row in given):
        return False
    if not all(isinstance(part, str) for row in given for part in row):
        return False
    return set(map(tuple, given)) == set(map(tuple, metadata["solution"]))
