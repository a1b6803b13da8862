"""The page's own tables (arms, effects, scores by round, ...) as tables of typed cells, for the exported files."""

from __future__ import annotations

from prsl_kernels.experiments.report import text
from prsl_kernels.experiments.report.analysis import THRESHOLDS, Findings
from prsl_kernels.experiments.report.datatable import Cell, DataTable, Level, PValue, Ratio
from prsl_kernels.experiments.report.evidence import flags
from prsl_kernels.experiments.report.sections import arm_cell
from prsl_kernels.experiments.report.sweeps import candidates
from prsl_kernels.experiments.report.tables import WORST, TaskTables, metric_name

Rows = tuple[tuple[Cell, ...], ...]


def when(tables: TaskTables) -> str:
    """The endpoint's setting as a heading: "worst case", or "round 20"; the worst of one attack is its last round."""
    end = tables.endpoint
    if end.attack == WORST:
        return "worst case" if len(candidates(tables)) > 1 else f"round {tables.main_round}"
    name = "" if end.attack == tables.main_attack else f" of {end.attack}"
    return f"round {end.round}{name}"


def page_tables(findings: Findings) -> list[DataTable]:
    """Every table of the page that is not one of a sceptic's sections; those without rows are left out."""
    tables = [
        _arms(findings), _effects(findings), _exploratory(findings), _rounds(findings), _shares(findings),
        _levels(findings), _checks(findings), flag_table(findings), _groups(findings),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _arms(findings: Findings) -> DataTable:
    tables = findings.tables
    columns = ("Arm", "Loss", "k", "V", "b", "Space", "Distance", "Gradient ratio asked", "Gradient ratio measured",
               "CE at base", "CE selected", "Step", "Steps", "Seed")  # fmt: skip
    rows: Rows = tuple(
        (arm_cell(tables, arm), run.loss, None if run.is_cross_entropy else run.k, run.vocab_size, Ratio(run.b),
         run.space, run.distance, Ratio(run.gradient_ratio_target), Ratio(run.gradient_ratio_measured),
         run.base_eval_cross_entropy, run.eval_cross_entropy, run.selected_step, run.steps, run.seed)
        for arm in tables.arms for run in tables.runs[arm]
    )  # fmt: skip
    return DataTable("arms", "The arms and their fine-tuning", columns, rows)


def _effects(findings: Findings) -> DataTable:
    tables = findings.tables
    score, setting = metric_name(tables.endpoint.score), when(tables)
    heading = setting.capitalize()
    columns = ("Arm", "Clean", heading, f"{heading} less clean", "Images", "Images that differ", "p", "p Holm",
               "Over the seeds' means")  # fmt: skip
    rows: Rows = tuple(
        (arm_cell(tables, effect.arm), effect.clean, effect.attacked, effect.drop, effect.images, effect.differing,
         PValue(effect.p), PValue(effect.p_holm), effect.across_seeds)
        for effect in findings.effects
    )  # fmt: skip
    return DataTable("effects", f"Primary endpoint: {score}, arm minus cross entropy, {setting}", columns, rows)


def _exploratory(findings: Findings) -> DataTable:
    tables = findings.tables
    columns = ("Score", *(tables.label(arm) for arm in tables.others))
    rows: list[tuple[Cell, ...]] = [
        (metric_name(metric), *(by_arm[arm] for arm in tables.others))
        for metric, by_arm in findings.exploratory.items() if by_arm
    ]  # fmt: skip
    if findings.secondary:
        name = f"{metric_name(tables.endpoint.score)} against the arm's own clean output"
        rows.append((name, *(findings.secondary[arm] for arm in tables.others)))
    caption = f"Every other score, {when(tables)}, arm minus cross entropy: exploratory"
    return DataTable("exploratory", caption, columns, tuple(rows) if tables.others else ())


def _rounds(findings: Findings) -> DataTable:
    tables = findings.tables
    columns = ("Score", "Of", "Arm", "Round", "Value", "Blank image", "Random pairs")
    rows: Rows = tuple(
        (metric_name(curve.metric), "corpus" if curve.corpus else "mean over images", arm_cell(tables, arm), number,
         value, curve.blank, curve.random_pair)
        for curve in findings.curves for arm in tables.arms
        for number, value in zip(curve.rounds, curve.values[arm], strict=True)
    )  # fmt: skip
    return DataTable("rounds", f"Scores against the rounds of {tables.main_attack}", columns, rows)


def _shares(findings: Findings) -> DataTable:
    columns = ("Score", "Attack", "Round", "Images", "Arm", *(f"Share below {bound:.2f}" for bound in THRESHOLDS))
    rows: Rows = tuple(
        (metric_name(shares.metric), shares.attack, shares.round, shares.images, arm_cell(findings.tables, arm),
         *(Level(point, percent=True) for point in points))
        for shares in findings.shares for arm, points in shares.below.items()
    )  # fmt: skip
    return DataTable("low-scores", "Share of outputs below a threshold, with 95 % Wilson intervals", columns, rows)


def _levels(findings: Findings) -> DataTable:
    tables = findings.tables
    rows: Rows = tuple(
        (arm_cell(tables, arm), Level(clean), Level(attacked), findings.attack_effects[arm])
        for arm, (clean, attacked) in findings.levels.items()
    )
    columns = ("Arm", "Clean", when(tables).capitalize(), "What the attack did")
    return DataTable("levels", f"{metric_name(tables.endpoint.score)}, clean and attacked", columns, rows)


def _checks(findings: Findings) -> DataTable:
    said = {None: "not in this run", True: "passed", False: "failed"}
    rows: Rows = tuple((check.name, said[check.passed], check.found) for check in findings.checks)
    return DataTable("controls", "Controls", ("Control", "Outcome", "Found"), rows)


def flag_table(findings: Findings) -> DataTable:
    """Every piece of evidence with its state, as the evidence file has it."""
    tables = findings.tables
    rows: Rows = tuple(
        (flag.name, flag.state, flag.reason, text.listing([tables.label(arm) for arm in flag.arms]) or None)
        for flag in flags(findings)
    )
    return DataTable("flags", "Every piece of evidence and its state", ("Evidence", "State", "Why", "Concerns"), rows)


def _groups(findings: Findings) -> DataTable:
    tables, frame = findings.tables, findings.groups
    columns = ("Group", "Images", "Arm", "Clean", when(tables).capitalize(), "Blank image")
    rows: Rows = () if frame.empty else tuple(
        (str(row["group"]), int(row["images"]), arm_cell(tables, str(row["arm"])), float(row["clean"]),
         float(row["attacked"]), float(row["blank"]) if "blank" in frame else None)
        for _, row in frame.iterrows() if row["arm"] in tables.arms
    )  # fmt: skip
    return DataTable("groups", f"{metric_name(tables.endpoint.score)} by group: exploratory", columns, rows)
