# nuciseg with all it needs, run by a user without privileges.
#
#   docker build -t nuciseg .                                  CUDA on x86-64: PyPI's PyTorch brings its own CUDA libraries,
#                                                              the host gives the driver (docker run --gpus all)
#   docker build -t nuciseg --build-arg TORCH_INDEX_URL=URL .  PyTorch from another index, for example PyTorch's own CPU wheels:
#                                                              several GB smaller
#   docker run --rm --shm-size 2g nuciseg                      searches on drawn clusters, then removes what it made
#   docker run --rm --shm-size 2g -v "$PWD:/data" nuciseg python -m nuciseg.train --data.root /data --run.storage_path /data/runs
ARG BASE=debian:12-slim

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/nuciseg
ENV PATH=/opt/nuciseg/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG TORCH_INDEX_URL=""
# The largest layer first, and from pyproject.toml's bounds alone, so that a change of the code does not install PyTorch again.
COPY pyproject.toml /src/
RUN python3 -c "import tomllib; \
wanted = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']['dependencies']; \
print('\n'.join(name for name in wanted if name.startswith('torch')))" > /src/torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} --requirement /src/torch.txt
COPY LICENSE README.md /src/
COPY nuciseg /src/nuciseg
RUN pip install '/src[weights]'

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /srv/nuciseg --uid 1000 nuciseg
COPY --from=build /opt/nuciseg /opt/nuciseg
ENV PATH=/opt/nuciseg/bin:$PATH RAY_USAGE_STATS_ENABLED=0 NO_ALBUMENTATIONS_UPDATE=1 PYTHONUNBUFFERED=1
USER 1000
WORKDIR /srv/nuciseg
COPY tune_configs tune_configs
CMD ["python", "-m", "nuciseg.tune"]
