"""reasoning-gym's data sets: how we read each one's answer, and which fault of the package's own scorer we avoid.

Every data set of version 0.1.25 is here or in ``data.prompts.sources.UNSUITABLE``.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ring.rl.reward.gym import puzzles
from megatron_ring.rl.reward.gym import scorers as by
from megatron_ring.rl.reward.gym.scorers import Scorer

_JUNK = "pays for junk after the answer"
_EVAL = "hands the answer to eval()"
_SYMPY = "hands the answer to sympy's parse_expr, which is eval()"
_HUGE = "raises or hangs on huge numbers"

_TEXT = Scorer(how="text, but for white space around it", right=by.by_text)
_FOLDED = Scorer(how="text, upper or lower case", right=by.by_folded)
_SQUEEZED = Scorer(how="text, without white space, upper or lower case", right=by.by_squeezed)
_WORDS = Scorer(how="words, upper or lower case", right=by.by_words)
_GRID = Scorer(how="words in lines", right=by.by_grid)
_LIST = Scorer(how="a JSON list, quotes of either kind", right=by.by_list)
_WHOLE = Scorer(how="a whole number", right=by.by_whole)
_DECIMAL = Scorer(how="a number in decimal notation, exactly", right=by.by_decimal)

SCORERS: Mapping[str, Scorer] = {
    **dict.fromkeys(("ab", "acre", "bf", "caesar_cipher", "circuit_logic"), _TEXT),
    **dict.fromkeys(("emoji_mystery", "mahjong_puzzle", "string_manipulation"), _TEXT),
    **dict.fromkeys(("course_schedule", "isomorphic_strings", "ransom_note", "syllogism"), _FOLDED),
    **dict.fromkeys(("color_cube_rotation", "family_relationships", "spell_backward"), _FOLDED),
    **dict.fromkeys(("tsumego", "zebra_puzzles"), _FOLDED),
    **dict.fromkeys(("dice", "figlet_font", "needle_haystack"), _SQUEEZED),
    **dict.fromkeys(("sentence_reordering", "path_star"), _WORDS),
    **dict.fromkeys(("arc_1d", "futoshiki", "manipulate_matrix", "mini_sudoku", "modulo_grid"), _GRID),
    **dict.fromkeys(("rotate_matrix", "string_splitting", "string_synthesis", "sudoku"), _GRID),
    **dict.fromkeys(("list_functions", "number_filtering"), _LIST),
    **dict.fromkeys(("aiw", "basic_arithmetic", "binary_alternation", "count_bits", "count_primes"), _WHOLE),
    **dict.fromkeys(("gcd", "largest_island", "lcm", "leg_counting", "letter_counting", "maze"), _WHOLE),
    **dict.fromkeys(("number_sequence", "rotten_oranges", "self_reference", "simple_equations"), _WHOLE),
    **dict.fromkeys(("rectangle_count",), _WHOLE),
    **dict.fromkeys(("chain_sum", "decimal_chain_sum", "products", "simple_geometry"), _DECIMAL),
    "advanced_geometry": Scorer(
        how="a number, or two in brackets, to the last place that is asked for",
        right=by.by_geometry,
        reads=("task_type",),
        found=_JUNK,
    ),
    "arc_agi": Scorer(how="whole numbers in lines", right=by.by_output, reads=("output",)),
    "base_conversion": Scorer(how="digits, lower case", right=by.by_digits, found="zero is no digit at all"),
    "binary_matrix": Scorer(how="words in lines", right=by.by_grid, found=_EVAL),
    "bitwise_arithmetic": Scorer(
        how="a whole number with its prefix (0x)", right=by.by_base, found="hands the problem's file to eval()"
    ),
    "calendar_arithmetic": Scorer(how="a whole number, or a word", right=by.by_calendar, found=_HUGE),
    "codeio": Scorer(how="a JSON value", right=by.by_json, found="true is 1; runs its own programs to make a problem"),
    "coin_flip": Scorer(
        how="a fraction, exactly, or a number to four places, three significant digits and all of its own",
        right=by.by_probability,
        reads=("rational",),
        found="pays 0, as the beginning of 0.25; " + _HUGE,
    ),
    "complex_arithmetic": Scorer(
        how="a + bi, exactly", right=by.by_complex, reads=("result",), found="pays nan for everything"
    ),
    "countdown": Scorer(
        how="+ - * / and brackets over exactly the numbers given, exactly",
        right=by.by_countdown,
        reads=("numbers", "target"),
        found=_SYMPY + "; numbers count wherever they stand, as in the length of a list",
    ),
    "cryptarithm": Scorer(
        how="A=1,B=2",
        right=by.by_puzzle(puzzles.cryptarithm),
        reads=("words_letters", "result_letters", "allow_leading_zero"),
        found="a letter may be given twice",
    ),
    "decimal_arithmetic": Scorer(
        how="a number to the places of the problem, and three significant digits",
        right=by.by_near,
        reads=("decimal_places",),
        found="pays 0 for values near it"
    ),
    "fraction_simplification": Scorer(
        how="a/b or \\frac{a}{b}, reduced",
        right=by.by_fraction,
        reads=("simplified_numerator", "simplified_denominator"),
        found=_JUNK,
    ),
    "game_of_life": Scorer(how="a JSON list of lists", right=by.by_life, found=_JUNK + " (further rows)"),
    "game_of_life_halting": Scorer(
        how="text, upper or lower case", right=by.by_folded, found="pays any text where the answer is True"
    ),
    "group_anagrams": Scorer(how="a JSON list of lists of words, any order", right=by.by_anagrams, reads=("solution",)),
    "gsm_symbolic": Scorer(how="a number, perhaps with $ or %", right=by.by_money, found=_JUNK),
    "intermediate_integration": Scorer(
        how="an expression whose derivative is the integrand",
        right=by.by_integral,
        reads=("integrand", "variable"),
        found=_SYMPY + ", and so it does the file; an integral left standing pays",
    ),
    "jugs": Scorer(how="a JSON list of moves, played", right=by.by_puzzle(puzzles.jugs), reads=("puzzle",)),
    "kakurasu": Scorer(how="0 and 1 in lines", right=by.by_kakurasu, reads=("row_sums", "col_sums"), found=_JUNK),
    "knight_swap": Scorer(
        how="No, or a JSON list of moves, played",
        right=by.by_puzzle(puzzles.knight_swap),
        reads=("board", "pieces", "start_turn", "is_possible", "solution"),
        found="writes into the problem",
    ),
    "knights_knaves": Scorer(how="X is a knight, and Y is a knave", right=by.by_knights, found=_JUNK),
    "letter_jumble": Scorer(how="words, upper or lower case", right=by.by_words, found=_JUNK),
    "n_queens": Scorer(how="any valid board", right=by.by_board, reads=("valid_answers",), found=_EVAL),
    "number_format": Scorer(
        how="a number, nearer to the solution than to other candidates",
        right=by.by_candidate,
        reads=("solution", "candidates"),
    ),
    "number_sorting": Scorer(
        how="a JSON list of numbers, quotes of either kind, exactly",
        right=by.by_sorted,
        reads=("sorted_numbers",),
        found="hands the problem's file to eval(); pays a list of NaN, and numbers off by 1",
    ),
    "palindrome_generation": Scorer(
        how="the letters, as a palindrome", right=by.by_palindrome, reads=("letters",)
    ),
    "palindrome_partitioning": Scorer(
        how="a JSON list of all partitions, any order", right=by.by_puzzle(puzzles.partitions), reads=("solution",)
    ),
    "polynomial_equations": Scorer(how="numbers between commas, to four places", right=by.by_roots),
    "polynomial_multiplication": Scorer(
        how="an expanded polynomial", right=by.by_expanded, found=_SYMPY + ", and so it does the file"
    ),
    "pool_matrix": Scorer(how="numbers in lines, to two places", right=by.by_pool, found=_JUNK + " (comments)"),
    "power_function": Scorer(how="a number to three significant digits", right=by.by_significant),
    "prime_factorization": Scorer(
        how="primes between multiplication signs, any order", right=by.by_primes, found="raises on text"
    ),
    "puzzle24": Scorer(
        how="+ - * / and brackets over exactly the numbers given, exactly",
        right=by.by_game24,
        reads=("numbers",),
        found=_SYMPY + "; pays for any four numbers, and rounds the result down",
    ),
    "quantum_lock": Scorer(
        how="buttons between arrows, played",
        right=by.by_puzzle(puzzles.quantum_lock),
        reads=("solution_path", "buttons", "initial_value", "initial_state", "target_value"),
        found=_JUNK,
    ),
    "rearc": Scorer(how="whole numbers in lines", right=by.by_output, reads=("output",)),
    "shortest_path": Scorer(
        how="directions, walked", right=by.by_puzzle(puzzles.shortest_path), reads=("matrix", "solution")
    ),
    "simple_integration": Scorer(
        how="an expression whose derivative is the integrand",
        right=by.by_integral,
        reads=("integrand", "variable"),
        found=_SYMPY + ", and so it does the file",
    ),
    "sokoban": Scorer(how="letters of LDUR, played", right=by.by_puzzle(puzzles.sokoban), reads=("gamestr",), found=_JUNK),
    "spiral_matrix": Scorer(how="words in lines", right=by.by_grid, found=_EVAL),
    "string_insertion": Scorer(how="text, but for white space around it", right=by.by_text, found=_EVAL),
    "survo": Scorer(how="whole numbers in lines", right=by.by_survo, reads=("solution",), found=_JUNK),
    "time_intervals": Scorer(how="D days, HH:MM:SS, or parts of it", right=by.by_interval, found=_JUNK),
    "tower_of_hanoi": Scorer(
        how="moves in lines, played",
        right=by.by_puzzle(puzzles.hanoi),
        reads=("num_disks", "num_pegs", "start_peg", "target_peg", "solution_length"),
    ),
    "word_ladder": Scorer(
        how="words between commas, of the package's dictionary",
        right=by.by_puzzle(puzzles.word_ladder),
        reads=("start_word", "end_word"),
    ),
    "word_sequence_reversal": Scorer(how="words between commas", right=by.by_listed_words),
    "word_sorting": Scorer(
        how="words between commas", right=by.by_sorted_words, reads=("sorted_words",), found=_JUNK
    ),
}  # fmt: skip
"""The scorer of each data set. None of them evaluates an answer."""
