# What nanobind's stub generator cannot know: the types inside a constant.
PIN$:
    PIN: dict[str, str]
