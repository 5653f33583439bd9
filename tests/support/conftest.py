"""The projects here are run by tests, and are none of ours."""

collect_ignore = ["outcomes", "suites"]
