# A server of models: docker build -t diffusion-adagn . && docker run -p 7860:7860 -e ADAGN_TOKEN=my-own-secret diffusion-adagn
# With a GPU: docker build --build-arg TORCH=cuda ..., and docker run --gpus all ...
# Own models: docker run -v $PWD/runs:/runs ... diffusion-adagn serve /runs/mine --host 0.0.0.0
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /app
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
COPY . .
RUN if [ "$TORCH" = cpu ]; then backend=cpu; else backend=auto; fi; \
    uv pip install --system --no-cache --torch-backend=$backend -c constraints.txt -e '.[serve,ui]'
EXPOSE 7860
ENTRYPOINT ["adagn"]
CMD ["serve", "digits", "--host", "0.0.0.0"]
