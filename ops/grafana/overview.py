"""Is it learning, is it fed, is it fresh: one page for whoever is woken."""

from ops.grafana.panel import Board, Row, panel, per

ROLES = '{job=~"demo|connect|fetch|train|evaluate|serve|refresh"}'

BOARD = Board(
    "overview",
    "streamlearn / Overview",
    "Is it learning, is it fed, is it fresh; then whether the roles are there and have room.",
    (
        Row(
            "Now",
            (
                panel(1, "Roles up", "short", "1: Prometheus reaches it.", (f"up{ROLES}", "{{job}} {{instance}}"), stat=True, bad_below=1),
                panel(
                    2,
                    "Steps a minute",
                    "short",
                    "Is it learning? Optimizer steps.",
                    (f"60 * {per('learner_steps_total', 'job')}", "steps"),
                    stat=True,
                    bad_below=0.01,
                ),
                panel(
                    3,
                    "Images stored a second",
                    "short",
                    "Is it fed?",
                    (per("fetch_outcomes_total", "job", '{outcome="stored"}'), "stored"),
                    stat=True,
                ),
                panel(
                    4,
                    "From discovery to learnt",
                    "s",
                    "Is it fresh? 95th percentile from discovery to stored, and the age of the newest image learnt.",
                    ("stream:freshness:seconds", "freshness"),
                    stat=True,
                    bad_from=7200,
                ),
                panel(
                    5,
                    "k-NN accuracy",
                    "percentunit",
                    "Of the newest snapshot that was measured, by bank.",
                    ('max by (bank) (evaluator_accuracy_ratio{probe="knn"})', "{{bank}}"),
                    stat=True,
                ),
                panel(
                    6,
                    "Alerts that fire",
                    "short",
                    "Without the watchdog, which always does.",
                    ('count(ALERTS{alertstate="firing", severity!="none"}) or vector(0)', "firing"),
                    stat=True,
                    bad_from=1,
                ),
            ),
        ),
        Row(
            "Is it learning",
            (
                panel(
                    7,
                    "Loss",
                    "short",
                    "In nats. Chance is ln K: what a model that knows nothing has. Prequential: on fresh images, before the update.",
                    ("learner_loss_nats", "loss"),
                    ("learner_prequential_loss_nats", "prequential"),
                    ("learner_chance_loss_nats", "chance"),
                ),
                panel(
                    8,
                    "Accuracy of the probes",
                    "percentunit",
                    "Of each newest snapshot, on fixed labelled images.",
                    ("evaluator_accuracy_ratio", "{{bank}} {{probe}}"),
                ),
                panel(
                    9,
                    "Images learnt a second",
                    "short",
                    "Fresh for the first time, replay again.",
                    (per("learner_images_total", "kind"), "{{kind}}"),
                ),
            ),
        ),
        Row(
            "Is it fed, is it fresh",
            (
                panel(
                    10,
                    "Candidates found and images stored a second",
                    "short",
                    "What sources announce, and what of it ends as an image.",
                    (per("connect_candidates_total", "job"), "candidates"),
                    (per("fetch_outcomes_total", "job", '{outcome="stored"}'), "stored"),
                ),
                panel(18, "From discovery to learnt, over time", "s", "As the figure above.", ("stream:freshness:seconds", "freshness")),
                panel(
                    12,
                    "Budgets, as they burn",
                    "short",
                    "1: as fast as the objective allows, over the last hour. Freshness: 95 % stored within half an hour. Progress: steps in 99 % of minutes.",
                    ("stream_late:ratio_rate1h / 0.05", "freshness"),
                    ("learner_idle:ratio1h / 0.01", "progress"),
                    ("serve_errors:ratio_rate1h / 0.005", "serve"),
                ),
            ),
        ),
        Row(
            "Roles",
            (
                panel(
                    11,
                    "Since the last heartbeat",
                    "s",
                    "A loop that hangs goes on showing its last figures; its heartbeat stops.",
                    ("instance:heartbeat_age:seconds", "{{job}} {{instance}}"),
                    bad_from=300,
                ),
                panel(
                    17,
                    "Starts within the hour",
                    "short",
                    "Of each role's process, after its first.",
                    (f"changes(process_start_time_seconds{ROLES}[1h])", "{{job}} {{instance}}"),
                ),
                panel(
                    14,
                    "Memory",
                    "bytes",
                    "Resident, of each role's process; a loader's workers are not in it.",
                    (f"process_resident_memory_bytes{ROLES}", "{{job}} {{instance}}"),
                ),
                panel(
                    15,
                    "CPU",
                    "short",
                    "Cores in use by each role's process.",
                    (f"rate(process_cpu_seconds_total{ROLES}[$__rate_interval])", "{{job}} {{instance}}"),
                ),
                panel(
                    13,
                    "Free room on the home's disk",
                    "percentunit",
                    "Of the disk that holds the role's own state.",
                    ("streamlearn_home_free_bytes / streamlearn_home_bytes", "{{job}} {{instance}}"),
                    bad_below=0.03,
                ),
                panel(
                    19,
                    "Alerts by state",
                    "short",
                    "Names of what fires or is about to.",
                    ("count by (alertname, alertstate) (ALERTS)", "{{alertname}} {{alertstate}}"),
                ),
                panel(
                    16,
                    "Versions",
                    "short",
                    "What runs where; the watchdog among the alerts shows that Prometheus evaluates its rules.",
                    ("count by (version, role) (streamlearn_build_info)", "{{role}} {{version}}"),
                ),
            ),
        ),
    ),
)
