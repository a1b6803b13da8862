"""The sections of a task that answer a sceptic: their tables, and one sentence each with its number and interval.

The sentences state numbers; what may be concluded from them is said by the verdict alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prsl_kernels.experiments.report.analysis import Findings
from prsl_kernels.experiments.report.claims import convergence_told, too_few
from prsl_kernels.experiments.report.datatable import ArmCell, Cell, DataTable, Level, PValue, Ratio, Share
from prsl_kernels.experiments.report.grid import grid_section
from prsl_kernels.experiments.report.scepticism import Convergence, Doubling, Levels, MaskingTest
from prsl_kernels.experiments.report.section import Section
from prsl_kernels.experiments.report.statistics import Interval
from prsl_kernels.experiments.report.tables import TaskTables, metric_name
from prsl_kernels.experiments.report.text import listing, pixels


def sections(findings: Findings) -> dict[str, Section]:
    """Anchor -> section, in the order of the page; that of the grid only where the run has one."""
    builders: tuple[Callable[[Findings], Section], ...] = (
        _ensemble, _convergence, _sweep, _floors, _transfer, _white_box, _gradients, _surface, _seeds, _language,
    )  # fmt: skip
    grid = grid_section(findings.tables)
    found = [*([] if grid is None else [grid]), *(build(findings) for build in builders)]
    return {section.anchor: section for section in found}


def arm_cell(tables: TaskTables, arm: str) -> ArmCell:
    """The arm as a cell."""
    return ArmCell(arm, tables.label(arm))


def _score(findings: Findings) -> str:
    return metric_name(findings.tables.endpoint.score)


def _of(findings: Findings, levels: Levels, *, signed: bool = True) -> str:
    """ "X [..] for cross entropy, and from Y [..] (arm) to Z [..] (arm) for the others": the range in one line."""
    tables = findings.tables

    def said(arm: str) -> str:
        level = Level(levels[arm])
        return levels[arm].text if signed else f"{level.value} {level.range}"

    others = sorted((arm for arm in tables.others if arm in levels), key=lambda arm: levels[arm].estimate)
    parts = [f"{said(tables.baseline)} for cross entropy"] if tables.baseline in levels else []
    if others:
        ends = [f"{said(arm)} ({tables.label(arm)})" for arm in dict.fromkeys((others[0], others[-1]))]
        parts.append(f"from {ends[0]} to {ends[1]} for the others" if len(ends) > 1 else ends[0])
    return listing(parts)


def _levels_of_255(eps: float) -> float | int:
    levels = round(255 * eps, 4)
    return int(levels) if levels == int(levels) else levels


def _extreme(findings: Findings, effects: Levels) -> str:
    """The effects with the lowest and the highest estimate."""
    tables = findings.tables
    arms = [arm for arm in tables.others if arm in effects]
    if not arms:
        return ""
    low, high = (pick(arms, key=lambda arm: effects[arm].estimate) for pick in (min, max))
    if low == high:
        return f"{tables.label(low)} minus cross entropy: {effects[low].text}."
    return (
        f"Arm minus cross entropy runs from {effects[low].text} ({tables.label(low)}) to {effects[high].text} "
        f"({tables.label(high)})."
    )


def _levels(levels: Levels, arms: tuple[str, ...]) -> list[Cell]:
    return [Level(levels[arm]) if arm in levels else None for arm in arms]


def _ensemble(findings: Findings) -> Section:
    found, tables = findings.scepticism, findings.tables
    anchor, title, question = "ensemble", "Ensemble of attacks", "Would another attack have done more?"
    attacks = [attack for attack in found.attacks if attack.levels]
    if sum(attack.role not in ("worst", "control") for attack in attacks) < 2:
        return Section(anchor, title, question, "")
    labels = [tables.label(arm) for arm in tables.arms]
    rows: list[tuple[Cell, ...]] = []
    effects: list[tuple[Cell, ...]] = []
    chosen: list[tuple[Cell, ...]] = []
    for attack in attacks:
        budget = "" if attack.eps is None else f"{attack.eps:.4g}" if attack.norm == "l2" else pixels(attack.eps)
        if attack.norm == "l2" and budget:
            budget += " (L2)"
        restarts = attack.restarts if attack.restarts and attack.restarts > 1 else None
        rows.append(
            (attack.attack, attack.role, attack.method, attack.objective, budget or None, attack.round, restarts,
             attack.images, *_levels(attack.levels, tables.arms))
        )  # fmt: skip
        effects.append((attack.attack, attack.role, attack.images, *(attack.effects.get(a) for a in tables.others)))
        if attack.chosen is not None:
            chosen.append((attack.attack, *(attack.chosen.get(arm, 0) for arm in tables.arms)))
    several = len(found.ensemble) > 1
    worst = next((attack for attack in attacks if attack.role == "worst" and several), None)
    lead = worst or attacks[0]
    answer = (
        f"{_score(findings)} under {f'the worst of {len(found.ensemble)} attacks' if worst else lead.attack} is "
        f"{Level(lead.levels[tables.baseline]).value} {Level(lead.levels[tables.baseline]).range} for cross entropy. "
        f"{_extreme(findings, lead.effects)}"
    )
    shown = [
        DataTable(
            "attacks", f"{_score(findings)} that each attack leaves at its last round",
            ("Attack", "Role", "Method", "Objective", "eps", "Round", "Restarts", "Images", *labels), tuple(rows),
        ),
    ]  # fmt: skip
    if tables.others:
        others = tuple(tables.label(arm) for arm in tables.others)
        caption = f"{_score(findings)}, arm minus cross entropy, under each attack"
        shown.append(DataTable("attack-effects", caption, ("Attack", "Role", "Images", *others), tuple(effects)))
    if chosen:
        caption = "How often each attack was the worst (images, over all seeds)"
        shown.append(DataTable("worst-chosen", caption, ("Attack", *labels), tuple(chosen)))
    note = (
        "The worst case is taken image by image, by the primary score, over the attacks of the ensemble. All "
        "differences but the declared endpoint's are exploratory."
    )
    for probe in found.probes:
        if probe.lower:
            answer += (
                f" Beside the ensemble, {probe.attack}, within the same budget, goes below its worst case by "
                f"{listing([f'{probe.differences[arm].text} ({tables.label(arm)})' for arm in probe.lower])}."
            )
    return Section(anchor, title, question, answer, note, tuple(shown), ("ensemble",))


def _convergence(findings: Findings) -> Section:
    found, tables = findings.scepticism.convergence, findings.tables
    anchor, title, question = "convergence", "Convergence", "Would more rounds, or more restarts, have done more?"
    if found.doubling is None:
        return Section(anchor, title, question, "")
    rows: list[tuple[Cell, ...]] = []
    for kind, doublings in (("rounds", (found.doubling, *found.others)), ("restarts", found.restarts)):
        for doubling in doublings:
            for arm in tables.arms:
                if arm in doubling.changes:
                    rows.append(
                        (doubling.attack, kind, doubling.before, doubling.after, doubling.images,
                         arm_cell(tables, arm), doubling.changes[arm], doubling.effects.get(arm),
                         found.tolerance.get(arm), _state(found, doubling, arm))
                    )  # fmt: skip
    caption = f"Change of {_score(findings)} over the last doubling of rounds, and from the first restart to all"
    table = DataTable(
        "convergence", caption,
        ("Attack", "Doubled", "From", "To", "Images", "Arm", "Change", "Change of arm minus CE", "Tolerance", "State"),
        tuple(rows),
    )  # fmt: skip
    doubling = found.doubling
    answer = (
        f"From round {doubling.before} to {doubling.after} of {doubling.attack}, {_score(findings)} changed by "
        f"{_of(findings, doubling.changes)}. {convergence_told(findings)}."
    )
    note = (
        "Tolerance: a tenth of what the main attack did to the arm in all. Converged: the whole interval lies within; "
        "of the other attacks, it does not reach below. Moving: it excludes zero and is not within. Unclear: the run "
        "cannot tell. Absent: the attack did nothing."
    )
    return Section(anchor, title, question, answer, note, (table,), ("convergence",))


def _state(found: Convergence, doubling: Doubling, arm: str) -> str | None:
    """Of the main attack its state; of the other attacks that the endpoint or its confirmation rests on, theirs."""
    if doubling is found.doubling:
        return f"{found.states[arm]}: the attack did nothing" if arm in found.idle else found.states[arm]
    if arm in found.idle:
        return None
    return "unclear" if doubling.changes[arm].low < -found.tolerance[arm] else "converged"


def _sweep(findings: Findings) -> Section:
    found, tables = findings.scepticism.sweep, findings.tables
    anchor, title, question = "eps", "Score against eps", "Does a larger budget do more, at every size?"
    if found is None:
        return Section(anchor, title, question, "")
    rows: list[tuple[Cell, ...]] = []
    for number, point in enumerate(found.points):
        for arm in tables.arms:
            if arm in found.levels:
                effect = found.effects[arm][number] if arm in found.effects else None
                step = found.steps[arm][number - 1] if number and arm in found.steps else None
                rows.append(
                    (_levels_of_255(point.eps), point.attack if point.eps else "clean", point.round,
                     arm_cell(tables, arm), Level(found.levels[arm][number]), effect, step)
                )  # fmt: skip
    table = DataTable(
        "eps", f"{_score(findings)} against the budget, on the {found.images:,} images that all budgets have",
        ("eps, levels of 255", "Attack", "Round", "Arm", _score(findings), "Arm minus CE", "Since the budget before"),
        tuple(rows),
    )  # fmt: skip
    rising = [tables.label(arm) for arm in tables.arms if found.monotone.get(arm) is False]
    last = {arm: levels[-1] for arm, levels in found.levels.items()}
    answer = (
        f"At eps {pixels(found.points[-1].eps)}, the largest of {len(found.points)} budgets, {_score(findings)} is "
        f"{_of(findings, last, signed=False)}; "
        + (f"a larger budget raised it somewhere for {listing(rising)}." if rising else
           "no larger budget measurably raised it.")
    )  # fmt: skip
    return Section(anchor, title, question, answer, "", (table,), ("eps",))


def _floors(findings: Findings) -> Section:
    tables = findings.tables
    anchor, title, question = "floor", "Unbounded attack", "Does an attack without a bound reach the floor?"
    floors = findings.scepticism.floors
    if not floors:
        return Section(anchor, title, question, "")
    rows: list[tuple[Cell, ...]] = [
        (floor.attack, None if floor.eps is None else _levels_of_255(floor.eps), floor.round, floor.images,
         arm_cell(tables, arm), Level(floor.levels[arm]), floor.unrelated, floor.above[arm],
         "yes" if floor.reached[arm] else "no")
        for floor in floors for arm in tables.arms if arm in floor.levels
    ]  # fmt: skip
    columns = ("Attack", "eps, levels of 255", "Round", "Images", "Arm", _score(findings), "Unrelated texts",
               "Above unrelated", "Reached")  # fmt: skip
    table = DataTable("floor", f"{_score(findings)} under attacks without a bound", columns, tuple(rows))
    missed = sorted({tables.label(arm) for floor in floors for arm, reached in floor.reached.items() if not reached})
    floor = floors[0]
    answer = (
        f"The attack “{floor.attack}” leaves {_of(findings, floor.levels, signed=False)}; unrelated texts have "
        f"{floor.unrelated:.3f}. "
        + (f"The floor is not reached for {listing(missed)}." if missed else "The floor is reached for every arm.")
    )
    note = "" if floor.by_image else "The score of unrelated texts is of the whole set, without an interval of its own."
    return Section(anchor, title, question, answer, note, (table,))


def _test_row(findings: Findings, test: MaskingTest) -> tuple[Cell, ...]:
    tables = findings.tables
    source = tables.label(test.source) if test.source in tables.runs else test.source
    return (arm_cell(tables, test.arm), source, test.images, Level(test.level), Level(test.white_box), test.difference,
            test.same_attack, PValue(test.p), "yes" if test.suspicious else "no")  # fmt: skip


_TEST_COLUMNS = (
    "Arm asked", "Images from", "Images", "Score", "White box", "Minus white box", "Minus the same attack here", "p",
    "Suspicious",
)  # fmt: skip
_TEST_NOTE = (
    "White box: for each image the lowest score over the gradient attacks of the ensemble. A score wholly below it "
    "(interval below zero, p one-sided and adjusted over all these comparisons) would be evidence of masked gradients."
)


def _transfer(findings: Findings) -> Section:
    found, tables = findings.scepticism.masking.transfer, findings.tables
    anchor, title, question = "transfer", "Transfer between arms", "Do images made on another arm do more?"
    if found is None:
        return Section(anchor, title, question, "")
    sources = [arm for arm in tables.arms if any(pair[0] == arm for pair in found.matrix)]
    matrix: list[tuple[Cell, ...]] = [
        (arm_cell(tables, target), *(
            Level(found.matrix[source, target]) if (source, target) in found.matrix else None for source in sources
        ))
        for target in tables.arms if any(pair[1] == target for pair in found.matrix)
    ]  # fmt: skip
    tests = [test for arm in tables.arms for test in found.tests.values() if test.arm == arm]
    suspicious = [test for test in tests if test.suspicious]
    shown = (
        DataTable(
            "transfer", f"{_score(findings)} of the arm asked (row) on images that {found.attack} made on (column); "
            f"on the diagonal the white box of the same attack; {found.images:,} images",
            ("Arm asked", *(f"made on {tables.label(source)}" for source in sources)), tuple(matrix),
        ),
        DataTable(
            "transfer-tests", f"Transferred images against the white box, {_score(findings)}", _TEST_COLUMNS,
            tuple(_test_row(findings, test) for test in tests),
        ),
    )  # fmt: skip
    return Section(
        anchor,
        title,
        question,
        _test_answer(findings, tests, suspicious, "transferred images"),
        _TEST_NOTE,
        shown,
        ("transfer", "white-box"),
    )


def _test_answer(findings: Findings, tests: list[MaskingTest], suspicious: list[MaskingTest], what: str) -> str:
    tables = findings.tables
    lowest = min(tests, key=lambda test: test.difference.estimate)
    few = too_few(tests)
    source = tables.label(lowest.source) if lowest.source in tables.runs else lowest.source
    return (
        f"{len(suspicious)} of {len(tests)} comparisons of {what} with the white box are suspicious; the lowest is "
        f"{lowest.difference.text}, of {tables.label(lowest.arm)} under images from {source}."
        + (f" That excludes nothing: {few}." if few else "")
    )


def _white_box(findings: Findings) -> Section:
    queries = findings.scepticism.masking.queries
    anchor, title, question = "query", "Query attack", "Does an attack that needs no gradient do more?"
    tests = [test for query in queries for test in query.tests.values()]
    if not tests:
        return Section(anchor, title, question, "")
    caption = f"Attacks without gradients against the white box, {_score(findings)}"
    table = DataTable("query", caption, _TEST_COLUMNS, tuple(_test_row(findings, test) for test in tests))
    spent = listing([f"{query.attack}: {query.rounds:,} queries on {query.images:,} images" for query in queries])
    note = f"{_TEST_NOTE} {spent}."
    # With transfer there, its section holds the figure of both.
    figures = () if findings.scepticism.masking.transfer is not None else ("white-box",)
    answer = _test_answer(findings, tests, [test for test in tests if test.suspicious], "query attacks")
    return Section(anchor, title, question, answer, note, (table,), figures)


def _gradients(findings: Findings) -> Section:
    tables = findings.tables
    anchor, title, question = "gradients", "Input gradients", "Do the gradients vanish, or break?"
    found = [health for health in findings.scepticism.masking.gradients if health.zero_share is not None
             or health.norm is not None]  # fmt: skip
    if not found:
        return Section(anchor, title, question, "")
    columns = ("Arm", "Zero, most", "Not finite, most", "Images × seeds", "With a norm", "L2 norm", "Norm over CE's",
               "Norm over CE's, low", "Norm over CE's, high")  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for health in found:
        over = health.norm_over_baseline
        ends = (None, None, None) if over is None else (over.estimate, over.low, over.high)
        rows.append(
            (arm_cell(tables, health.arm), Share(health.zero_share, 2), Share(health.nonfinite_share, 2),
             health.norm_of or None, health.norm_images if health.norm_of else None, Ratio(health.norm),
             *(None if value is None else Ratio(value) for value in ends))
        )  # fmt: skip
    caption = "Input gradients of the main attack: largest shares of zero and non-finite entries, geometric mean norm"
    worst = max(found, key=lambda health: health.zero_share or 0.0)
    answer = f"At most {Share(worst.zero_share, 2).value or 0:.2%} of the entries are exactly zero " \
             f"({tables.label(worst.arm)})"  # fmt: skip
    ratios = [health for health in found if health.norm_over_baseline is not None]
    if ratios:
        furthest = min(ratios, key=lambda health: health.norm_over_baseline.estimate)  # type: ignore[union-attr]
        over = furthest.norm_over_baseline
        assert over is not None
        answer += (
            f"; the smallest norm, relative to cross entropy's, is {over.estimate:.2f} [{over.low:.2f}, "
            f"{over.high:.2f}] ({tables.label(furthest.arm)}, which has one on {furthest.norm_images:,} of "
            f"{furthest.norm_of:,} images)"
        )
    answer += "."
    if none := [tables.label(health.arm) for health in found if health.norm_of and health.norm is None]:
        answer += f" {listing(none)} has no norm: every gradient is zero or not finite."
    note = (
        "A norm is of the images whose gradient is neither zero nor broken, and of no others. A healthy norm acquits "
        "nobody: gradients may be large and lead nowhere."
    )
    table = DataTable("gradients", caption, columns, tuple(rows))
    return Section(anchor, title, question, answer, note, (table,), ("attack",))


def _surface(findings: Findings) -> Section:
    tables, found = findings.tables, findings.scepticism.masking.surfaces
    anchor, title, question = "surface", "Loss surface", "Is the objective smooth, and does the gradient point uphill?"
    if not found:
        return Section(anchor, title, question, "")
    rows: list[tuple[Cell, ...]] = [
        (arm_cell(tables, surface.arm), surface.images, surface.along_gradient, surface.along_random,
         surface.difference, Share(surface.roughness))
        for surface in found
    ]  # fmt: skip
    columns = ("Arm", "Images × seeds", "Rise along the gradient's sign", "Rise along random signs", "Difference",
               "Roughness")  # fmt: skip
    caption = "Rise of the attack's objective from the clean image to the edge of the budget"
    rises = {surface.arm: surface.difference for surface in found}
    answer = f"Along the gradient's sign the objective rises further than along random signs by {_of(findings, rises)}."
    note = "Roughness: root mean square deviation from a parabola along the gradient's sign, over the range."
    return Section(anchor, title, question, answer, note, (DataTable("surface", caption, columns, tuple(rows)),),
                   ("surface",))  # fmt: skip


def _seeds(findings: Findings) -> Section:
    tables, rows = findings.tables, findings.scepticism.seeds
    anchor, title, question = "seeds", "Training seeds", "Is it the loss, or the luck of one training run?"
    seeds = sorted({row.seed for row in rows})
    if len(seeds) < 2:
        return Section(anchor, title, question, "")
    shown: tuple[tuple[Cell, ...], ...] = tuple(
        (arm_cell(tables, row.arm), row.seed, row.clean, row.attacked,
         row.effect)
        for row in rows
    )  # fmt: skip
    table = DataTable(
        "seeds", f"{_score(findings)} by training seed, means over images",
        ("Arm", "Seed", "Clean", "Attacked", "Attacked, minus CE"), shown,
    )  # fmt: skip
    parts = []
    for arm in tables.others:
        effects = [row.effect for row in rows if row.arm == arm and row.effect is not None]
        if effects:
            same = max(sum(effect > 0 for effect in effects), sum(effect < 0 for effect in effects))
            parts.append(f"{same} of {len(effects)} ({tables.label(arm)})")
    intervals: Mapping[str, Interval] = {effect.arm: effect.attacked for effect in findings.effects}
    answer = f"Seeds whose difference has the same sign: {listing(parts)}. {_extreme(findings, intervals)}"
    return Section(anchor, title, question, answer, "", (table,), ("seeds",))


def _language(findings: Findings) -> Section:
    tables, found = findings.tables, findings.scepticism.language
    anchor, title, question = "language", "What is said", "Is it robust, or does it say little?"
    if not found:
        return Section(anchor, title, question, "")
    counted = findings.language.set_index("arm")
    rows: list[tuple[Cell, ...]] = []
    likeness: list[tuple[Cell, ...]] = []
    for row in found:
        plain = {key: counted.loc[row.arm, f"{key}_{row.setting}"] for key in ("words", "distinct", "empty", "blank")}
        arm = arm_cell(tables, row.arm)
        rows.append(
            (arm, row.setting, float(plain["words"]) if row.words is None else Level(row.words), row.words_effect,
             float(plain["distinct"]), row.distinct_1, row.distinct_2, Share(float(plain["empty"])))
        )  # fmt: skip
        if plain["blank"] is not None:
            level = None if row.blank is None else Level(row.blank)
            likeness.append((arm, row.setting, Share(float(plain["blank"])), level, row.blank_effect))
    shown = [
        DataTable(
            "language", "Length and diversity of what is said",
            ("Arm", "Setting", "Words", "Words, minus CE", "Distinct outputs", "Distinct-1", "Distinct-2", "Empty"),
            tuple(rows),
        )
    ]  # fmt: skip
    if likeness:
        caption = f"Sameness with what the arm says of a blank image, and likeness ({_score(findings)}) to it"
        columns = ("Arm", "Setting", "The same", "Likeness", "Likeness, minus CE")
        shown.append(DataTable("blank-likeness", caption, columns, tuple(likeness)))
    attacked = [row for row in found if row.setting == "attacked"]
    longer = {row.arm: row.words_effect for row in attacked if row.words_effect is not None}
    blank = {row.arm: row.blank_effect for row in attacked if row.blank_effect is not None}
    parts = []
    if longer:
        parts.append(f"Words per output under attack. {_extreme(findings, longer)}")
    if blank:
        parts.append(f"Likeness to the blank image's output. {_extreme(findings, blank)}")
    lengths = {row.arm: row.words for row in attacked if row.words is not None}
    if lengths and not parts:
        parts.append(f"Words per output under attack: {_of(findings, lengths, signed=False)}.")
    if not parts:
        told = [f"{counted.loc[arm, 'words_attacked']:.2f} ({tables.label(arm)})" for arm in tables.arms]
        parts.append(f"Words per output under attack: {listing(told)}.")
    answer = " ".join(parts)
    note = "A model that says little, or one thing of every image, can look unmoved by an attack."
    return Section(anchor, title, question, answer, note, tuple(shown))
