"""Chat and embed through vllm-proxy with the official client: `pip install openai`, then `python chat.py`."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")

print([model.id for model in client.models.list()])

stream = client.chat.completions.create(
    model="chat", messages=[{"role": "user", "content": "Say hello."}], max_tokens=64, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

vector = client.embeddings.create(model="embed", input="Hello").data[0].embedding
print(f"{len(vector)} dimensions: {vector[:3]} ...")
