"""Packaging, and the only place where a dependency is named."""

from setuptools import find_packages, setup

extras = {
    'text': ['transformers', 'sentencepiece'],           # BERT and T5 embeddings of captions
    'weights': ['safetensors'],                           # the files of diffusers' save_pretrained
    'video': ['av'],                                      # mp4, webm, mov, mkv, avi, in and out
    'test': [
        'pytest', 'pytest-xdist', 'hypothesis',
        'nbclient', 'ipykernel',                          # the README runs in a real notebook kernel
        'diffusers', 'transformers', 'safetensors', 'peft',  # what the parity tests compare against
        'video-diffusion-pytorch==0.6.3', 'av',
        'ruff',
    ],
}

setup(
    name='video_diffusion',
    version='0.1.0',
    description='Learn, train and sample video diffusion models: small, fast, and every claim tested',
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    license='MIT',
    packages=find_packages(include=['video_diffusion', 'video_diffusion.*']),
    package_data={'video_diffusion': ['py.typed']},
    python_requires='>=3.10',
    # torch and torchvision are left to the registry, resolved together: a CPU-only torch wheel and
    # the ordinary torchvision wheel install side by side but cannot be imported together.
    install_requires=[
        'torch>=2.6', 'torchvision', 'einops', 'einops-exts', 'rotary-embedding-torch', 'pillow', 'tqdm',
    ],
    extras_require=extras,
)
