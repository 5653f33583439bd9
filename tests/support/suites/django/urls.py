from django.http import HttpResponse
from django.urls import path

urlpatterns = [path("word/", lambda request: HttpResponse("a word"))]
