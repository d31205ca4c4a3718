# llmq for a class, on a CPU or an NVIDIA GPU: `docker compose up`, or see docs/deploy.md.
FROM python:3.12-slim-bookworm

# The C library is compiled on the machine that it runs on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The one build argument, where torch is taken from. Empty: pip's own builds, with CUDA. An index of CPU builds: a small
# image for a CPU (docs/deploy.md). --build-arg TORCH_INDEX=ADDRESS
ARG TORCH_INDEX=""
WORKDIR /app
COPY requirements.txt .
RUN grep '^torch' requirements.txt > /tmp/torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r /tmp/torch.txt \
    && pip install --no-cache-dir -r requirements.txt \
    && rm /tmp/torch.txt

# Whoever runs it has no name and no home; /cache is all that is written, and /tmp.
ENV HOME=/cache USER=llmq LLMQ_CACHE=/cache/llmq HF_HOME=/cache/huggingface \
    GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860 PYTHONUNBUFFERED=1
COPY . .
RUN python -m compileall -q app.py llmq \
    && python -m llmq models --fetch demo \
    && chmod -R a+rX . && chmod -R a+rwX /cache
VOLUME /cache
USER 10001:10001
EXPOSE 7860
HEALTHCHECK --start-period=2m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/healthz')"]
CMD ["python", "app.py"]
