"""Trims tokenizer and embeddings to what a scenario uses: prices, the order in which tokens go, the trimmed folder.

prices = price_vocabulary(folder, texts, weights)
trim_model(folder, prices.rows_for(32768), out)
"""

from cusprun.vocabulary.merges import close, order_removals
from cusprun.vocabulary.pieces import Pieces, read_pieces
from cusprun.vocabulary.prices import VocabularyPrices, load_prices, price_vocabulary, set_prices
from cusprun.vocabulary.splits import SplitCosts, measure_splits
from cusprun.vocabulary.trim import trim_companions, trim_model
from cusprun.vocabulary.usage import Usage, count_tokens, expected_rates

__all__ = [
    "Pieces",
    "SplitCosts",
    "Usage",
    "VocabularyPrices",
    "close",
    "count_tokens",
    "expected_rates",
    "load_prices",
    "measure_splits",
    "order_removals",
    "price_vocabulary",
    "read_pieces",
    "set_prices",
    "trim_companions",
    "trim_model",
]
