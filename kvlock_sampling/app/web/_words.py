"""What the page says."""

CANCELLED = "Cancelled. Nothing of this run was kept."
HINT = (
    "Draw on what is to change, or upload a mask, which is white there. One drawing holds for every frame; drawings on "
    "several frames are joined over time."
)
TOKENS = (
    "Attention sees tokens, not pixels. A locked token's keys and values are the clip's, an edited token's its own, "
    "and all tokens read both. Those in the transition band take half of the lock."
)
RESULT = "An edit is shown here beside the clip, with the trace of what was measured and of what the policy did."
LEAD = "Draw what is to change, say what it should show, and see what the lock on the rest did."
TRACE = (
    "A run goes from left to right, as the noise level sigma falls. *Variance* is how much the prediction in the mask "
    "still changes, *risk* is variance over its threshold, and *effect* how much the edit changes a token outside "
    "the mask. *Lock* is how much of the clip's keys and values attention reads, *composite* how much of its pixels is "
    "pasted, and the *CFG scale* how strongly the prompt acts."
)
