"""Prompts to embeddings: one vector of `dim` numbers for each prompt, which steers the U-Net.

    ['a red ball rolls left', 'blue']                  texts: b strings
    [[a, red, ball, rolls, left], [blue, -, -, -, -]]  words (word pieces in BERT), padded: (b, n)
    one vector per word, from a table or from BERT     (b, n, dim)
    mean over the words, not over the padding          (b, dim)

Every encoder is a module with an attribute `dim`, `forward(texts) -> (b, dim)` and `tokens(texts) -> (b, n, dim)`, the
words themselves, with rows of zeros as padding, for networks that look at them one by one (`Unet3D(text_tokens=True)`).
So the rest of the library need not know which of the three it holds:

- `WordEncoder` learns a table of word vectors together with the U-Net. Nothing is downloaded; good for
  small worlds with a few hundred words.
- `BertEncoder` is a large frozen transformer that has read a lot of text (Devlin et al., "BERT", 2018,
  https://arxiv.org/abs/1810.04805). It knows word order, and words that no caption in your folder used.
- `T5Encoder` is the encoder of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), with `length=226` as CogVideoX uses it.

    encoder = WordEncoder(dim=64)
    cond = encoder(['a red ball rolls left', 'a blue square'])     # (2, 64)

Shape comments: b prompts, n words of the longest prompt.
"""

import hashlib
import re
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .. import checkpoint
from ..checks import whole
from ..distributed import Processes


def check_texts(texts: list[str]) -> None:
    """A lone string would otherwise be read as a list of letters, and train without complaint."""
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'texts={texts!r:.80}: give a list of strings, one prompt per clip')


def masked_mean(vectors: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The mean over n of those (b, n, dim) vectors where keep (b, n) is 1; zeros where there is none."""
    keep = keep.to(vectors.dtype).unsqueeze(-1)                               # b n 1
    return (vectors * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)         # b dim


def word_rows(text: str, buckets: int) -> list[int]:
    """The table row of each word. Two words can share a row; with few words that is rare.

    crc32 gives the same row in every process. Python's own hash() of a string is salted anew at each
    start, so that a model loaded tomorrow would look its words up in the wrong rows.
    """
    words = re.findall(r'[^\W_]+', text.lower())        # runs of letters and digits, of any alphabet
    return [zlib.crc32(word.encode()) % buckets for word in words]


class WordEncoder(nn.Module):
    """The mean of learned word vectors; an empty prompt gives zeros.

    A mean does not know the order of its words: 'red ball, blue box' and 'blue ball, red box' are the
    same to it. Where order carries meaning, use BertEncoder.
    """

    def __init__(self, dim: int = 64, buckets: int = 4096):     # buckets: rows of the word table
        super().__init__()
        if dim < 1 or buckets < 1:
            raise ValueError(f'dim={dim}, buckets={buckets}: both must be 1 or more')
        self.dim, self.buckets = dim, buckets
        self.words = nn.Embedding(buckets, dim)
        # The mean of n independent rows of variance v has variance v / n. Rows of variance 5 therefore
        # give a five-word prompt, a typical caption, the unit variance that the U-Net's layers expect.
        nn.init.normal_(self.words.weight, std=5 ** 0.5)

    def config(self) -> dict:
        return {'kind': 'words', 'dim': self.dim, 'buckets': self.buckets}

    def forward(self, texts: list[str]) -> torch.Tensor:
        return masked_mean(*self.states(texts))                                                       # b dim

    def tokens(self, texts: list[str]) -> torch.Tensor:
        vectors, keep = self.states(texts)
        return vectors * keep.unsqueeze(-1)                                                           # b n dim

    def states(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of the words (b n dim), and which of them are not padding (b n)."""
        check_texts(texts)
        rows = [torch.tensor(word_rows(text, self.buckets), dtype=torch.long) for text in texts]
        rows = pad_sequence(rows, batch_first=True, padding_value=-1)                                 # b n
        rows = rows.to(self.words.weight.device, non_blocking=True)
        return self.words(rows.clamp(min=0)), rows >= 0


class BertEncoder(nn.Module):
    """A frozen BERT, or another text encoder that transformers can load (DistilBERT, RoBERTa, ...).

    pool='mean' averages the last layer over the tokens without [CLS] and padding; pool='cls' takes the
    [CLS] token, which BERT puts first to stand for the whole text. What a prompt has beyond the tokens
    that the model can read (512 for BERT) is cut off. `name_or_path` is a directory or a name on the hub.
    dtype='bfloat16' halves the memory, on hardware that has it; the embeddings are float32 in any case.
    """
    kind, model_class = 'bert', 'AutoModel'

    def __init__(self, name_or_path: str = 'bert-base-cased', pool: str = 'mean', dtype: str = 'float32'):
        super().__init__()
        for name, value, allowed in (('pool', pool, ('mean', 'cls')), ('dtype', dtype, ('float32', 'bfloat16'))):
            if value not in allowed:
                raise ValueError(f'{name}={value!r}: choose {allowed[0]!r} or {allowed[1]!r}')
        self.name_or_path, self.pool, self.dtype = str(name_or_path), pool, dtype
        self.tokenizer, transformer = load_transformer(self.name_or_path, self.model_class, getattr(torch, dtype))
        if pool == 'cls' and self.tokenizer.cls_token is None:
            raise ValueError(f"pool='cls': {self.name_or_path!r} has no CLS token, so use pool='mean'")

        # The frozen weights are already on disk, so a training checkpoint should hold only their name.
        # Set behind nn.Module's back, the transformer is invisible to state_dict(), parameters() and
        # train(): not saved, not optimised, always in eval mode. So is it to .to(), hence `_apply` below.
        object.__setattr__(self, 'transformer', transformer.eval().requires_grad_(False))
        self.dim = transformer.config.hidden_size
        longest = getattr(transformer.config, 'max_position_embeddings', 512)
        # RoBERTa and its kind count positions from that of padding on: no token has those before.
        longest -= max((table.padding_idx + 1 for name, table in transformer.named_modules()
                        if name.endswith('position_embeddings') and getattr(table, 'padding_idx', None) is not None), default=0)
        self.max_tokens = min(longest, self.tokenizer.model_max_length)     # 1e30 where it has no limit
        self.first = 0 if self.tokenizer.cls_token is None else 1           # the CLS token is no word

    def config(self) -> dict:
        config = {'kind': self.kind, 'name_or_path': self.name_or_path, 'pool': self.pool}
        return config if self.dtype == 'float32' else config | {'dtype': self.dtype}

    def _apply(self, fn, recurse=True):
        """.to(), .cuda() and .double() come through here, called on this module or on one around it."""
        if 'transformer' in vars(self):
            self.transformer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def unload(self) -> None:
        """Let go of the transformer, once all captions are embedded: it has more weights than many a network beside it."""
        object.__delattr__(self, 'transformer')

    def forward(self, texts: list[str]) -> torch.Tensor:
        vectors, keep = self.states(texts)
        if self.pool == 'cls':
            return vectors[:, 0]                                                                 # b dim
        return masked_mean(vectors[:, self.first:], keep[:, self.first:])                        # b dim

    def tokens(self, texts: list[str]) -> torch.Tensor:
        vectors, keep = self.states(texts)
        return vectors[:, self.first:] * keep[:, self.first:, None]                              # b n dim

    def states(self, texts: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last layer (b n dim), and which of its rows are not padding (b n): None where, in so many rows, all count."""
        check_texts(texts)
        how = dict(padding=True, max_length=self.max_tokens) if length is None else dict(padding='max_length', max_length=length)
        tokens = self.tokenizer(list(texts), truncation=True, return_tensors='pt', **how).to(self.transformer.device)
        keep = tokens.attention_mask if length is None else None                                 # b n
        vectors = self.transformer(input_ids=tokens.input_ids, attention_mask=keep).last_hidden_state
        return vectors.to(torch.promote_types(vectors.dtype, torch.float32)), keep


class T5Encoder(BertEncoder):
    """The frozen encoder half of a T5; the decoder is not even loaded. It has no CLS token, so pool is 'mean'.

    With a `length` the tokens of every prompt are so many: cut off, or filled up with padding that T5 looks at as at any other
    token, and whose vectors are not zeros. CogVideoX, which has never seen anything else, takes all of them for text.
    """
    kind, model_class = 't5', 'T5EncoderModel'

    def __init__(self, name_or_path: str = 'google/t5-v1_1-base', pool: str = 'mean', dtype: str = 'float32',
                 length: int | None = None):
        super().__init__(name_or_path, pool, dtype)
        whole('length', length, 1)
        self.length = length

    def config(self) -> dict:
        return super().config() if self.length is None else super().config() | {'length': self.length}

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return super().tokens(texts) if self.length is None else self.states(texts, self.length)[0]       # b length dim


class CaptionCache:
    """What a frozen encoder says about each caption, asked for once and kept on the CPU, or in a folder.

    Each caption is embedded alone: beside others it would get their padding, and numbers that differ in the last digit
    from run to run, depending on who stood beside it first. Beyond `limit` numbers nothing more is kept (4 bytes each);
    a folder keeps all of them, in bf16 where that is what the encoder has computed, and the next run finds them there.
    """

    def __init__(self, embed, limit: int = 2 ** 29, folder: Path | None = None):
        self.embed, self.room, self.kept, self.folder = embed, limit, {}, folder

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """(b dim), or (b n dim) with zeros as padding where `embed` gives tokens."""
        rows = [self.kept[text] if text in self.kept else self.ask(text) for text in texts]
        return pad_sequence(rows, batch_first=True)

    def ask(self, text: str) -> torch.Tensor:
        if self.folder is not None and self.file(text).exists():
            return checkpoint.load(self.file(text)).float()
        row = self.embed([text])[0].cpu()                                                        # dim, or n dim
        if self.folder is not None:
            short = row.bfloat16()
            checkpoint.save(short if torch.equal(short.float(), row) else row, self.file(text))
        elif row.numel() <= self.room:
            self.kept[text], self.room = row, self.room - row.numel()
        return row

    def file(self, text: str) -> Path:
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:32] + '.pt')

    def fill(self, texts: set[str], processes: Processes) -> None:
        """Ask for all that are not there yet; several processes share them out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [text for text in sorted(texts)[processes.rank::processes.world_size] if not self.file(text).exists()]
        for text in tqdm(missing, desc='encoding captions', unit='caption', disable=not processes.is_main or not missing):
            self.ask(text)
        processes.wait()                                     # the others may have captions that we need


def caption_folder(encoder: nn.Module, folder: str | Path) -> Path:
    """Where in `folder` its captions are. Another encoder has another place: one with other weights, or another length."""
    some = ((name, weight.flatten()[:64]) for name, weight in encoder.transformer.named_parameters())     # of billions
    return Path(folder) / checkpoint.fingerprint(some, sorted(encoder.config().items()))


def text_encoder_from_config(config: dict, name_or_path: str | None = None) -> nn.Module:
    """The encoder that `config()` describes, before its weights are loaded.

    A checkpoint may say which frozen encoder it was trained with, but a file from elsewhere must not choose what is
    fetched from the hub: what is not in a directory on disk, the user has to name in `name_or_path`.
    """
    if config['kind'] == 'words' and name_or_path is not None:
        raise ValueError(f'text_encoder={name_or_path!r}: this model has learnt its words itself, leave it out')
    kinds = {'words': WordEncoder, 'bert': BertEncoder, 't5': T5Encoder}
    settings = {key: value for key, value in config.items() if key != 'kind'}
    if config['kind'] != 'words':
        settings['name_or_path'] = name_or_path or settings['name_or_path']
        if name_or_path is None and not Path(settings['name_or_path']).is_dir():
            raise ValueError(f'it was trained with the text encoder {settings["name_or_path"]!r:.100}, which is no directory here: '
                             'name it yourself to load it from the hub, text_encoder=... or --text-encoder ...')
    return kinds[config['kind']](**settings)


def named_bert(name_or_path: str | None, pool: str) -> BertEncoder:
    """For a network that asks for BERT by itself. None: it comes from a file, and nobody has named what to load."""
    if name_or_path is None:
        raise ValueError('this model was trained with the vectors of a BERT: name it yourself, text_encoder=... or --text-encoder, '
                         'bert-base-cased if it was the usual one')
    return BertEncoder(name_or_path, pool)


def load_transformer(name_or_path: str, model_class: str, dtype: torch.dtype) -> tuple:
    """Tokenizer and transformer, from a directory on disk, in which each may have a folder of its own, or from the hub."""
    try:
        import transformers  # an extra: imported only where it is used
    except ImportError as error:
        raise ImportError('this text encoder needs transformers: pip install "video_diffusion[text]"') from error
    folder = Path(name_or_path)
    how = dict(trust_remote_code=False, local_files_only=folder.is_dir())  # no code of theirs; the hub only by name
    places = (folder / 'tokenizer', folder / 'text_encoder') if (folder / 'text_encoder').is_dir() else (name_or_path,) * 2
    try:
        with torch.device('cpu'):
            tokenizer = transformers.AutoTokenizer.from_pretrained(places[0], **how)
            transformer = getattr(transformers, model_class).from_pretrained(places[1], dtype=dtype, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f'the text encoder {name_or_path!r} cannot be loaded: give a directory on disk that '
                         'holds its config, weights and vocabulary, or connect and download it') from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):     # a made-up one: all words are [UNK]
        raise ValueError(f'{name_or_path!r} holds no vocabulary: save the tokenizer beside the model')
    return tokenizer, transformer.get_encoder() if transformer.config.is_encoder_decoder else transformer
