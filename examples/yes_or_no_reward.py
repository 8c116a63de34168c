"""A yes/no reward: whether VADER, a lexicon of sentiment, calls the completion clearly positive.

python -m quark_fast.train --reward examples.yes_or_no_reward:clearly_positive
"""

from quark_fast import assets

_polarity = assets.vader().SentimentIntensityAnalyzer().polarity_scores


def clearly_positive(prompts, completions, **columns):
    return [_polarity(text)["compound"] > 0.5 for text in completions]
