# philora in a container: docker build -t philora . && docker run --rm -v "$PWD":/work philora demo
FROM python:3.12-slim

# gcc compiles philora's functions for the processor that the container runs on, when they are first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /philora/
COPY docs/troubleshooting.md /philora/docs/troubleshooting.md
COPY src /philora/src
RUN pip install --no-cache-dir -c /philora/constraints.txt \
    '/philora[quantization,evaluation,serve,gguf,excel,tensorboard]'

# Any user may write there: `docker run --user` names one.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
RUN mkdir -p /cache /work && chmod 777 /cache /work
WORKDIR /work
ENTRYPOINT ["philora"]
CMD ["--help"]
